"""Inference on images or clips of any size."""
