"""COCO masks: polygons, and column-major run lengths that start with a run of zeros.

Polygons are drawn by faster-coco-eval. Run lengths are read and written here, so that the composed digits don't need
that package. It also detects run lengths that do not fill the image only by decoding them, which takes about ten times
as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from anyres.extras import require
from anyres.shapes import Size


def coco_masks() -> Any:
    """Return the `mask` module of faster-coco-eval, COCO's own code. Raises UserError if it is not installed."""
    return require("faster_coco_eval.core.mask")


def draw(polygons: Sequence[np.ndarray], size: Size) -> np.ndarray:
    """Draw polygons (x1, y1, x2, y2, … each) as one mask, uint8 (h, w), exactly as COCO does."""
    library = coco_masks()
    merged = library.merge(library.frPyObjects([polygon.tolist() for polygon in polygons], *size))
    return decode(_decompress(merged["counts"]), size)


def encode(mask: np.ndarray) -> np.ndarray:
    """Convert a mask (h, w) of zeros and ones to run lengths, int32 (r,)."""
    pixels = mask.astype(bool).ravel(order="F")
    borders = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    start = [0, 0] if len(pixels) and pixels[0] else [0]
    return np.diff(np.concatenate([start, borders, [len(pixels)]])).astype(np.int32)


def decode(runs: np.ndarray, size: Size) -> np.ndarray:
    """Convert run lengths to a mask, uint8 (h, w), of zeros and ones."""
    values = (np.arange(len(runs)) % 2).astype(np.uint8)
    return np.repeat(values, runs).reshape(size, order="F")


def read(segmentation: dict[str, Any], size: Size) -> np.ndarray:
    """Read run lengths from a JSON object {"size": [h, w], "counts": list of numbers or COCO's compressed string}.

    Raises ValueError unless they are a mask of an image of `size`.
    """
    counts = segmentation.get("counts")
    if list(segmentation.get("size") or ()) != list(size):
        raise ValueError(f"the mask is for an image of size {segmentation.get('size')}, not {list(size)}")
    if isinstance(counts, str):
        runs = _decompress(counts.encode("ascii"))
    elif isinstance(counts, list):
        runs = np.array(counts, dtype=np.int64)
    else:
        raise ValueError("a mask has its run lengths under 'counts', as a list or compressed")
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"the run lengths do not add up to {size[0]}x{size[1]} pixels")
    return runs.astype(np.int32)


def _decompress(text: bytes) -> np.ndarray:
    """Decode COCO's compressed run lengths: numbers in groups of five bits, lowest first, one printable byte per group.

    A byte is the group plus the code of "0". Bit 5 says that another group follows, and bit 4 of the last group is the
    sign. From the fourth number on, each is stored as the difference from the number two places before it.
    """
    groups = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - ord("0")
    last = (groups & 32) == 0
    if len(groups) == 0 or groups.min() < 0 or groups.max() > 63 or not last[-1]:
        raise ValueError("the compressed run lengths are damaged")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(groups)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 6:
        raise ValueError("the compressed run lengths are damaged")
    numbers = np.add.reduceat((groups & 31) << (5 * place), starts)
    runs = numbers - np.where(groups[ends] & 16, np.int64(1) << (5 * (place[ends] + 1)), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
