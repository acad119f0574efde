"""Aspect ratios and display names of sizes. Sizes are (height, width) in pixels everywhere in anyres."""

from __future__ import annotations

import math

from anyres.errors import UserError

_LANDSCAPE = [(5, 4), (4, 3), (3, 2), (16, 10), (16, 9), (2, 1), (21, 9), (3, 1), (4, 1)]
_USUAL_ASPECTS = [(1, 1), *_LANDSCAPE, *[(height, width) for width, height in _LANDSCAPE]]


def parse_aspects(text: str) -> list[tuple[float, float]]:
    """Parse text such as "1:1,16:9,9:16" into (width, height) ratios. As for screens, 16:9 is wide and 9:16 is tall.

    Raises UserError for text that is not a list of ratios.
    """
    aspects: list[tuple[float, float]] = []
    for part in _parts(text, "aspect ratio", "1:1,16:9,9:16"):
        try:
            width, height = (float(number) for number in part.split(":"))
        except ValueError:
            raise UserError(f"aspect ratio '{part}' is not WIDTH:HEIGHT, e.g. 16:9") from None
        if not (math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0):
            raise UserError(f"aspect ratio '{part}' needs two positive numbers, e.g. 16:9")
        aspects.append((width, height))
    return list(dict.fromkeys(aspects))


def sizes_at_aspects(sides: list[int], aspects: list[tuple[float, float]]) -> list[tuple[int, int]]:
    """Return every side at every aspect ratio as (height, width), with about the area of the square of that side.

    With ratio = width/height, width = side·√ratio and height = side/√ratio, each rounded to the nearest pixel and at
    least 1. The sides are not rounded to multiples of the patch size, because anyres models accept any size.
    """
    sizes = []
    for width, height in aspects:
        root = math.sqrt(width / height)
        sizes += [(max(1, round(side / root)), max(1, round(side * root))) for side in sides]
    return list(dict.fromkeys(sizes))


def size_name(height: int, width: int) -> str:
    """Return the display name of a size: "224" for a square, "168×299" (height × width) otherwise."""
    return str(height) if height == width else f"{height}×{width}"


def aspect_name(height: int, width: int) -> str:
    """Return the ratio width:height of a size, by its usual name (such as "16:9") if one fits within rounding."""
    # Rounding moves each side by at most half a pixel.
    fitting = [(w, h) for w, h in _USUAL_ASPECTS if abs(width * h - height * w) <= 0.5 * (w + h)]
    if fitting:
        w, h = min(fitting, key=lambda ratio: abs(width / height - ratio[0] / ratio[1]))
        return f"{w}:{h}"
    return f"{width / height:.2f}:1" if width > height else f"1:{height / width:.2f}"


def _parts(text: str, what: str, example: str) -> list[str]:
    parts = [part.strip().lower().replace("×", "x") for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError(f"no {what} in '{text}'; give a list such as {example}")
    return parts
