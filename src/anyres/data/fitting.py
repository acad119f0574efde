"""The size that a dense image is tested and trained at: its ratio is kept."""

from __future__ import annotations

from anyres.shapes import Size


def fit(height: float, width: float, size: Size, longest: float = 4.0, divisor: int = 1) -> Size:
    """(h, w) of an image (height, width) scaled with its ratio kept.

    A square `size` (s, s) asks for a short side of s and a long side of at most `longest`·s: ADE20K's "(2048, 512)" is
    s = 512 and longest = 4, COCO's "800, at most 1333" is s = 800 and longest = 1333/800. Another `size` is a box: the
    short side is at most its short side, the long side at most its long side. Sides are rounded and at least 1, then
    rounded up to a multiple of `divisor`.
    """
    short, long = limits(size, longest)
    scale = min(short / min(height, width), long / max(height, width))
    fitted_height, fitted_width = (max(1, round(side * scale)) for side in (height, width))
    return -(-fitted_height // divisor) * divisor, -(-fitted_width // divisor) * divisor


def limits(size: Size, longest: float) -> Size:
    """What `fit` allows for the short and for the long side."""
    short, long = min(size), max(size)
    return short, round(longest * short) if short == long else long
