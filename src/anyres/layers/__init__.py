"""Layers shared by the models: attention, positions, patch embedding.

This package may import torch and timm.layers, but no higher package of anyres.
"""
