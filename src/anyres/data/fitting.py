"""Input sizes that follow the image: how an image is resized with its aspect ratio kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

from anyres.data.decode import BadImage
from anyres.errors import UserError
from anyres.shapes import Size


@dataclass(frozen=True)
class OwnSize:
    """An input size that each image chooses: that of its own aspect ratio with an area of `pixels`, or its own size.

    Raises UserError if no size of `pixels` has sides of at least `least`.
    """

    pixels: int | None
    """Area of the input; None leaves images as large as they are."""
    divisor: int = 1
    """Sides are rounded to multiples of this; images at their own size are not."""
    least: int = 1
    """The smallest side that the model takes."""

    def __post_init__(self) -> None:
        if self.pixels is not None and self.pixels < self.shortest**2:
            raise UserError(
                f"size native:{math.isqrt(self.pixels)} is below the model's minimum: give at least {self.shortest}"
            )

    @property
    def shortest(self) -> int:
        """The smallest side that is a multiple of `divisor`."""
        return -(-self.least // self.divisor) * self.divisor

    def of(self, full: Size, name: str) -> Size:
        """Return the input size (h, w) for the image `name` of size `full`.

        An image so long that its short side would be below the minimum is shown wider than it is; its area stays within
        `pixels`. Raises BadImage if an image at its own size is below the minimum.
        """
        if self.pixels is None:
            if min(full) < self.least:
                raise BadImage(name, f"it has {full[1]}x{full[0]} pixels, and the model needs sides of {self.least}")
            return full
        scale = math.sqrt(self.pixels / (full[0] * full[1]))
        longest = self.pixels // self.shortest // self.divisor * self.divisor
        height, width = (
            min(max(round(side * scale / self.divisor) * self.divisor, self.shortest), longest) for side in full
        )
        return height, width


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


def fit_test(full: Size, size: Size | OwnSize, longest: float, divisor: int, name: str) -> Size:
    """Return the input size of the image `name` of size `full` in a test: that of `fit`, or of an `OwnSize`.

    Sides are rounded up to multiples of `divisor` in both cases. Raises BadImage, see `OwnSize.of`.
    """
    if not isinstance(size, OwnSize):
        return fit(*full, size, longest, divisor)
    height, width = size.of(full, name)
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor
