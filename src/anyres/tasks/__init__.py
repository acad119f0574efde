"""Heads on a backbone: segmentation, detection, video."""
