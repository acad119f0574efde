"""Fonts for names in any script, in the pictures of results and of sweeps."""

from __future__ import annotations

import functools
import logging
from typing import Any

from anyres.io.text import escaped


@functools.cache
def font_for(text: str) -> Any:
    """The font (matplotlib's entry of it: `name`, `fname`) that has the most of the text's characters: DejaVu Sans,
    which comes with matplotlib, or where that lacks some, the best of those installed."""
    from matplotlib.font_manager import fontManager

    # It would remark on every font that comes in one weight alone.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    # One font of last resort draws a box for every character there is.
    fonts = [font for font in fontManager.ttflist if font.style == "normal" and not font.name.startswith("Last Resort")]
    own = next(font for font in fonts if font.name == "DejaVu Sans" and font.weight == 400)
    wanted = set(text)
    if wanted <= _characters(own.fname):
        return own
    return min(
        fonts,
        key=lambda font: (len(wanted - _characters(font.fname)), font is not own, font.weight != 400, font.fname),
    )


def drawable(text: str) -> str:
    """The text with escapes for the characters that `font_for` finds in no font."""
    known = _characters(font_for(text).fname)
    return "".join(char if char in known else escaped(char) for char in text)


@functools.cache
def _characters(file: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):  # removed since matplotlib listed it, or damaged
        return frozenset()
