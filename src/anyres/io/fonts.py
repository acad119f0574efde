"""Fonts for names in any script, for the drawn results and plots."""

from __future__ import annotations

import functools
import logging
from typing import Any

from anyres.io.text import escaped


@functools.cache
def font_for(text: str) -> Any:
    """Return the font that has the most characters of the text, as matplotlib's font entry (`name`, `fname`).

    This is DejaVu Sans, which comes with matplotlib, or the best installed font if DejaVu Sans lacks some characters.
    """
    from matplotlib.font_manager import fontManager

    # matplotlib would warn about every font that has only one weight.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    # The last-resort font has a box for every possible character.
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
    """Return the text with escapes for characters that `font_for` finds in no font."""
    known = _characters(font_for(text).fname)
    return "".join(char if char in known else escaped(char) for char in text)


@functools.cache
def _characters(file: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):  # damaged, or removed since matplotlib listed it
        return frozenset()
