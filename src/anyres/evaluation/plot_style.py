"""Style of a sweep's plots: colours and markers of the models, fonts, and display names of models.

The colours are those of Okabe and Ito, which are safe for the common kinds of colour blindness. Markers differ as well,
so that the plots can be read in greyscale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from anyres.io.fonts import drawable, font_for
from anyres.io.text import printable, shorten

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":")
INK, GREY, GRID = "#1a1a1a", "#666666", "#e4e4e4"
LETTERS = 24  # largest length of a model's name


def model_colour(index: int) -> str:
    """Return the colour of the model with this index in the sweep."""
    return COLOURS[index % len(COLOURS)]


@contextmanager
def style(models: Sequence[str] = ()) -> Iterator[None]:
    """Apply the style to plots made in this context, with fonts that cover the names of `models`."""
    import matplotlib

    settings: dict[str, Any] = {
        # Dollar signs in names must not be parsed as formulas.
        "text.parse_math": False, "text.usetex": False,
        "font.family": list(dict.fromkeys(["DejaVu Sans", *(font_for(short_name(model)).name for model in models)])),
        "font.size": 10, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlepad": 10,
        "axes.titlecolor": INK, "axes.labelsize": 9.5, "axes.labelcolor": GREY,
        "xtick.labelsize": 9, "ytick.labelsize": 9, "xtick.color": GREY, "ytick.color": GREY, "text.color": INK,
        "axes.edgecolor": "#9a9a9a", "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
        "axes.axisbelow": True, "axes.grid": False, "ytick.major.size": 0, "xtick.major.size": 3, "xtick.minor.size": 0,
        "svg.fonttype": "path", "svg.hashsalt": "anyres", "figure.dpi": 100,
    }  # fmt: skip
    options: Any = settings
    with matplotlib.rc_context(options):
        yield


def short_name(name: str) -> str:
    return shorten(printable(name), LETTERS)


def drawn_name(name: str) -> str:
    """Return the name of a model in plots: shortened, and limited to characters that available fonts can draw."""
    return shorten(drawable(short_name(name)), LETTERS)
