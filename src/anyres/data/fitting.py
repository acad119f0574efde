"""Resizing for dense tasks: how an image is fitted to a size with its aspect ratio kept."""

from __future__ import annotations

from anyres.shapes import Size


def fit(height: float, width: float, size: Size, longest: float = 4.0, divisor: int = 1) -> Size:
    """Return the size (h, w) of an image (height, width) scaled to fit `size` with its aspect ratio kept.

    A square `size` (s, s) asks for a short side of s and a long side of at most `longest`·s: ADE20K's "(2048, 512)" is
    s = 512 and longest = 4, COCO's "800, at most 1333" is s = 800 and longest = 1333/800. Any other `size` is a box:
    its short side limits the short side, and its long side the long side. Sides are rounded to at least 1, and then up
    to a multiple of `divisor`.
    """
    short, long = limits(size, longest)
    scale = min(short / min(height, width), long / max(height, width))
    fitted_height, fitted_width = (max(1, round(side * scale)) for side in (height, width))
    return -(-fitted_height // divisor) * divisor, -(-fitted_width // divisor) * divisor


def limits(size: Size, longest: float) -> Size:
    """Return the limits that `fit` sets for the short and the long side."""
    short, long = min(size), max(size)
    return short, round(longest * short) if short == long else long
