"""The pictures of a sweep: accuracy by size, accuracy against time, cost by size.

One reading key for all of them: a filled marker is a size that the model was trained at, a hollow one a size that it
never saw. Colours are those of Okabe and Ito, safe for the common kinds of colour blindness; markers differ too, so
that a grey print can be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import IO, TYPE_CHECKING, Any, Literal

from anyres.evaluation.aspects import aspect_name, size_name
from anyres.evaluation.results import SHORT_TITLES, TITLES, Row, main_score
from anyres.io.fonts import drawable, font_for
from anyres.io.text import printable, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", ":")
_INK, _GREY, _GRID, _BAND = "#1a1a1a", "#666666", "#e4e4e4", "#f0f0f0"
_LETTERS = 24  # of a model's name
_NON_SQUARE_DOTS = 12  # more non-square sizes than this are drawn as curves, one small panel for each aspect ratio


def model_colour(index: int) -> str:
    """Colour of the model at this place in the order of the sweep."""
    return COLOURS[index % len(COLOURS)]


def accuracy_figure(rows: list[Row], train_sides: dict[str, list[int]], narrow: bool = False) -> Figure:
    """The main score by the side of a square input, and beside it (below it when `narrow`) the non-square sizes.

    `train_sides` gives the sides of the square training sizes of each model: they are shaded, and set in bold on the
    axis.
    """
    squares = [row for row in rows if row.square]
    others = [row for row in rows if not row.square]
    models = _models(rows)
    with _style(models):
        panels = _non_square_panels(others)
        figure, main, beside = _accuracy_layout(bool(squares), panels, narrow)
        shaded = sorted({side for sides in train_sides.values() for side in sides})
        curves: list[tuple[Axes, list[Row], list[int]]] = []
        if main is not None:
            curves.append((main, squares, shaded))
            main.set_xlabel("input size (px, square, log scale)")
            main.set_title(_title(rows), loc="left")
            _key(main)
        for axes, (title, part) in zip(beside, panels, strict=True):
            if title is None:
                _draw_dots(axes, part, models)
            else:
                curves.append((axes, part, []))
                axes.set_title(f"{title} (width:height)", loc="left")
                axes.set_xlabel("side of the square of equal area (px)")
        for axes, part, _ in curves:
            _draw_by_side(axes, part, models)
            _limit_accuracy(axes, rows)
        _lay_out(figure)
        for axes, part, marked in curves:
            _size_axis(axes, sorted({round(row.side) for row in part}), marked)
            if axes is main or main is None:
                _label_ends(axes, part, models)
        return figure


def pareto_figure(rows: list[Row], narrow: bool = False) -> Figure:
    """The main score against measured time for each image; the grey line is what no other point beats in both."""
    timed = [row for row in rows if row.square and row.score is not None and row.images_per_second]
    models = _models(rows)
    with _style(models):
        figure, axes = _figure((4.6, 4.6) if narrow else (7.2, 4.4))
        points = [(_milliseconds(row), row.score or 0.0, row) for row in timed]
        front = _front(points)
        if len(front) > 1:
            axes.step(
                [x for x, _, _ in front],
                [y for _, y, _ in front],
                where="post",
                color="#dddddd",
                lw=5,
                zorder=1,
                solid_capstyle="round",
            )
        on_front = {id(row) for _, _, row in front}
        for index, model in reversed(list(enumerate(models))):
            curve = sorted((point for point in points if point[2].model == model), key=lambda point: point[2].height)
            _curve(axes, [(x, y, row.trained) for x, y, row in curve], index)
        axes.set_xscale("log")
        _limit_accuracy(axes, timed)
        _time_axis(axes, [x for x, _, _ in points])
        note = "\nsmall numbers: input size (px)" + (
            f"{chr(10) if narrow else '; '}grey: the most accurate for the time" if len(front) > 1 else ""
        )
        axes.set_xlabel("time per image (ms, in batches, log scale)" + note, linespacing=1.5)
        axes.set_title(_title(rows), loc="left")
        _lay_out(figure)
        _label_sizes(axes, points, on_front, models)
        last = [
            max((point for point in points if point[2].model == model), key=lambda point: point[2].height, default=None)
            for model in models
        ]
        _name_ends(
            axes, [(index, end[0], end[1], f"   {_label(end[2].model)}") for index, end in enumerate(last) if end]
        )
        return figure


def cost_figure(rows: list[Row], train_sides: dict[str, list[int]], narrow: bool = False) -> Figure:
    """Images each second, GFLOPs and peak memory by the side of a square input: three small panels."""
    squares = [row for row in rows if row.square]
    models = _models(rows)
    shaded = sorted({side for sides in train_sides.values() for side in sides})
    panels = (
        ("images_per_second", "Images per second"),
        ("gflops", "GFLOP per image"),
        ("peak_memory_mb", "Peak memory (MB)"),
    )
    with _style(models):
        figure = _empty_figure((4.6, 8.0) if narrow else (10.0, 3.1))
        grid = figure.subplots(3, 1) if narrow else figure.subplots(1, 3)
        for axes, (name, title) in zip(grid, panels, strict=True):
            for index, model in enumerate(models):
                curve = [(row.height, getattr(row, name), row.trained) for row in squares if row.model == model]
                # Models of one width and depth cost the same: earlier ones are drawn larger and show under later ones.
                known: list[tuple[float, float, bool]] = sorted((x, y, trained) for x, y, trained in curve if y)
                _curve(axes, known, index, marker_size=max(3.5, 9.0 - 3.0 * index), width=max(1.2, 4.5 - 1.7 * index))
            axes.set_yscale("log")
            _plain_log_ticks(axes.yaxis)
            axes.set_title(title, loc="left")
            axes.set_xlabel("input size (px)")
        _lay_out(figure)
        for axes in grid:
            _size_axis(axes, sorted({row.height for row in squares}), shaded)
        _legend(grid[0], models)
        return figure


def save(figure: Figure, target: str | PathLike[str] | IO[bytes], kind: Literal["png", "svg"] = "png") -> None:
    """Write a picture: PNG at 200 dots per inch, or SVG with letters as outlines, which look the same everywhere."""
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else {"Software": None}
    with _style():
        figure.savefig(target, format=kind, dpi=200, metadata=metadata)


@contextmanager
def _style(models: Sequence[str] = ()) -> Iterator[None]:
    """Settings of the pictures, with fonts for the names of `models`."""
    import matplotlib

    settings: dict[str, Any] = {
        # Names are no formulas, whatever dollar signs they hold.
        "text.parse_math": False, "text.usetex": False,
        "font.family": list(dict.fromkeys(["DejaVu Sans", *(font_for(_short(model)).name for model in models)])),
        "font.size": 10, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlepad": 10,
        "axes.titlecolor": _INK, "axes.labelsize": 9.5, "axes.labelcolor": _GREY,
        "xtick.labelsize": 9, "ytick.labelsize": 9, "xtick.color": _GREY, "ytick.color": _GREY, "text.color": _INK,
        "axes.edgecolor": "#9a9a9a", "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
        "axes.axisbelow": True, "axes.grid": False, "ytick.major.size": 0, "xtick.major.size": 3, "xtick.minor.size": 0,
        "svg.fonttype": "path", "svg.hashsalt": "anyres", "figure.dpi": 100,
    }  # fmt: skip
    options: Any = settings
    with matplotlib.rc_context(options):
        yield


def _empty_figure(inches: tuple[float, float]) -> Figure:
    # Not pyplot: it keeps global state and may want a display.
    from matplotlib.figure import Figure

    return Figure(figsize=inches, layout="constrained", facecolor="white")


def _figure(inches: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = _empty_figure(inches)
    return figure, figure.add_subplot()


def _title(rows: list[Row]) -> str:
    return f"{TITLES[main_score(rows)]} (%)"


def _models(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.model for row in rows))


def _non_square_panels(rows: list[Row]) -> list[tuple[str | None, list[Row]]]:
    """Few sizes: one panel of dots (title None). Many: one panel of curves for each aspect ratio."""
    if not rows:
        return []
    if len({row.size for row in rows}) <= _NON_SQUARE_DOTS:
        return [(None, rows)]
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(aspect_name(*row.size), []).append(row)
    return list(panels.items())


def _accuracy_layout(
    squares: bool, panels: list[tuple[str | None, list[Row]]], narrow: bool
) -> tuple[Figure, Axes | None, list[Axes]]:
    """The main panel, and the non-square ones: a column at its right, or below it on a narrow page."""
    count = len(panels)
    dots = count == 1 and panels[0][0] is None
    shapes = len({row.size for row in panels[0][1]}) if dots else 0
    if narrow:
        below = (1.0 + 0.42 * shapes) if dots else 2.4 * count
        figure = _empty_figure((4.6, (4.2 if squares else 0.0) + (below if count else 0.0)))
        heights = ([4.2] if squares else []) + ([below] if dots else [2.4] * count)
        column = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        return (figure, column[0], column[1:]) if squares else (figure, None, column)
    if not squares:
        figure = _empty_figure((7.2, max(2.0, 0.45 * shapes + 1.0) if dots else 3.0 * count))
        return figure, None, list(figure.subplots(count, 1, squeeze=False)[:, 0])
    if not count:
        figure, axes = _figure((7.6, 4.4))
        return figure, axes, []
    height = 4.4 if count < 3 else 1.9 * count
    figure = _empty_figure((10.6, height))
    if dots:  # as high as its lines need, not stretched to the height of the curves
        share = min(0.99, (1.3 + 0.5 * shapes) / height)
        grid = figure.add_gridspec(2, 2, width_ratios=[2.7, 1], height_ratios=[share, 1 - share])
        return figure, figure.add_subplot(grid[:, 0]), [figure.add_subplot(grid[0, 1])]
    grid = figure.add_gridspec(count, 2, width_ratios=[2.7, 1])
    return figure, figure.add_subplot(grid[:, 0]), [figure.add_subplot(grid[index, 1]) for index in range(count)]


def _draw_by_side(axes: Axes, rows: list[Row], models: list[str]) -> None:
    for index, model in reversed(list(enumerate(models))):  # the first one lies on top
        _curve(
            axes,
            sorted((row.side, row.score, row.trained) for row in rows if row.model == model and row.score is not None),
            index,
        )


def _curve(
    axes: Axes, points: list[tuple[float, float, bool]], index: int, marker_size: float = 6.2, width: float = 1.8
) -> None:
    colour, marker = model_colour(index), _MARKERS[index % len(_MARKERS)]
    line = _LINES[index // len(COLOURS) % len(_LINES)]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], line, color=colour, lw=width, zorder=3)
    for trained, face in ((False, "white"), (True, colour)):
        chosen = [(x, y) for x, y, seen in points if seen is trained]
        if chosen:
            axes.plot(
                [x for x, _ in chosen],
                [y for _, y in chosen],
                marker,
                ms=marker_size,
                mec=colour,
                mew=1.5,
                mfc=face,
                zorder=3,
            )


def _draw_dots(axes: Axes, rows: list[Row], models: list[str]) -> None:
    sizes = list(dict.fromkeys(row.size for row in rows))
    place = {size: len(sizes) - 1 - number for number, size in enumerate(sizes)}
    for size, y in place.items():
        values = [row.score for row in rows if row.size == size and row.score is not None]
        if values:
            axes.plot([min(values), max(values)], [y, y], color=_GRID, lw=3, zorder=1, solid_capstyle="round")
    for index, model in enumerate(models):
        colour, marker = model_colour(index), _MARKERS[index % len(_MARKERS)]
        for row in rows:
            if row.model == model and row.score is not None:
                axes.plot(
                    row.score,
                    place[row.size],
                    marker,
                    ms=7,
                    mec=colour,
                    mew=1.5,
                    mfc=colour if row.trained else "white",
                    zorder=4,
                )
    for size, y in place.items():
        _label_dots(
            axes,
            [(row.score, models.index(row.model)) for row in rows if row.size == size and row.score is not None],
            y,
        )
    axes.set_yticks(list(place.values()), [f"{size_name(*size)}\n{aspect_name(*size)}" for size in place])
    axes.set_ylim(-0.7, len(sizes) - 0.3)
    values = [row.score for row in rows if row.score is not None]
    low, high = (min(values), max(values)) if values else (0.0, 100.0)
    margin = max(2.0, 0.18 * (high - low))
    axes.set_xlim(low - margin, high + margin)
    axes.spines["left"].set_visible(False)
    axes.xaxis.grid(True, color=_GRID, lw=0.8)
    axes.set_title("Non-square sizes", loc="left")
    axes.set_xlabel(f"{SHORT_TITLES[main_score(rows)]} (%), height×width")


def _label_dots(axes: Axes, values: list[tuple[float, int]], y: float) -> None:
    """The number above each dot, except where it would cover its neighbour's."""
    previous = -math.inf
    all_values = [value for value, _ in values]
    room = 0.12 * max(10.0, max(all_values, default=0.0) - min(all_values, default=0.0))
    for value, index in sorted(values):
        below = value - previous < room
        axes.annotate(
            f"{value:.1f}",
            (value, y),
            xytext=(0, -7 if below else 7),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=8,
            color=model_colour(index),
        )
        previous = -math.inf if below else value


def _limit_accuracy(axes: Axes, rows: list[Row]) -> None:
    values = [row.score for row in rows if row.score is not None] or [0.0, 100.0]
    low, high = min(values), max(values)
    margin = max(1.5, 0.1 * (high - low))
    axes.set_ylim(max(0.0, low - margin) if low >= margin else -1.0, min(101.0, high + margin))
    axes.yaxis.grid(True, color=_GRID, lw=0.8)
    axes.spines["left"].set_visible(False)


def _size_axis(axes: Axes, sides: list[int], trained: list[int]) -> None:
    """A log2 axis whose ticks are the sizes; where labels would touch, training sizes and the ends keep theirs.

    Training sizes stand on a grey band and in bold.
    """
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    if not sides:
        return
    axes.set_xscale("log", base=2)
    spread = math.log2(sides[-1] / sides[0]) or 1.0
    axes.set_xlim(sides[0] / 2 ** (0.05 * spread), sides[-1] * 2 ** (0.05 * spread))
    axes.xaxis.set_major_locator(FixedLocator(sides))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    for side in trained:
        if sides[0] <= side <= sides[-1]:
            axes.axvspan(side / 1.035, side * 1.035, color=_BAND, lw=0, zorder=0)
    # Names at the ends of curves will take a part of the width.
    points = 0.85 * axes.get_window_extent().width / axes.figure.dpi * 72
    wanted = sorted(
        sides, key=lambda side: (side not in trained, side not in (sides[0], sides[-1]), -sides.index(side) % 2)
    )
    kept: list[int] = []
    for side in wanted:
        # A digit is about 5.6 points wide at this font size; a gap of one digit between labels.
        need = 5.6 * (len(str(side)) + 1.2)
        if all(abs(math.log2(side / other)) / (1.1 * spread) * points >= need for other in kept):
            kept.append(side)
    axes.set_xticklabels([str(side) if side in kept else "" for side in sides])
    for label, side in zip(axes.get_xticklabels(), sides, strict=True):
        if side in trained:
            label.set_fontweight("bold")
            label.set_color(_INK)


def _label_sizes(axes: Axes, points: list[tuple[float, float, Row]], on_front: set[int], models: list[str]) -> None:
    """The input size beside the points, most telling ones first, and only where it does not touch another number."""
    ends = {model: [row.height for _, _, row in points if row.model == model] for model in models}

    def rank(point: tuple[float, float, Row]) -> tuple[bool, bool, bool]:
        row = point[2]
        return row.height not in (min(ends[row.model]), max(ends[row.model])), not row.trained, id(row) not in on_front

    kept: list[tuple[float, float]] = []
    scale = 72 / axes.figure.dpi
    for x, y, row in sorted(points, key=rank):
        # Where the curve is not: above and left of the front, else below, on the side that it falls away from.
        before = max(
            (p for p in points if p[2].model == row.model and p[2].height < row.height),
            key=lambda p: p[2].height,
            default=None,
        )
        up = id(row) in on_front
        left = up or (before is not None and before[1] > y)
        place = axes.transData.transform((x, y)) * scale
        spot = (float(place[0]) + (-12 if left else 12), float(place[1]) + (10 if up else -10))
        if any(abs(spot[0] - other_x) < 21 and abs(spot[1] - other_y) < 10 for other_x, other_y in kept):
            continue
        kept.append(spot)
        axes.annotate(str(row.height), (x, y), xytext=(-4 if left else 4, 5 if up else -5), textcoords="offset points",
                      ha="right" if left else "left", va="bottom" if up else "top", fontsize=8,
                      color=model_colour(models.index(row.model)))  # fmt: skip


def _time_axis(axes: Axes, times: list[float]) -> None:
    if times:
        low, high = min(times), max(times)
        spread = math.log2(high / low) or 1.0
        axes.set_xlim(low / 2 ** (0.09 * spread), high * 2 ** (0.09 * spread))
    _plain_log_ticks(axes.xaxis)


def _plain_log_ticks(axis: Any) -> None:
    """1, 2, 5, 10, 20, … in plain digits."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _curves(rows: list[Row], models: list[str]) -> list[tuple[int, str, list[tuple[float, float]]]]:
    """(place, model, [(side, top-1), …]) of the models that have any value."""
    curves = []
    for index, model in enumerate(models):
        points = sorted((row.side, row.score) for row in rows if row.model == model and row.score is not None)
        if points:
            curves.append((index, model, points))
    return curves


def _label_ends(axes: Axes, rows: list[Row], models: list[str]) -> None:
    """Name and last value at the right end of every curve, and the first value at the left one."""
    curves = _curves(rows, models)
    line = _in_points(axes, 13)
    _name_ends(
        axes,
        [
            (index, *points[-1], f"{_label(model)}\n{points[-1][1]:.1f} at {round(points[-1][0])}")
            for index, model, points in curves
        ],
    )
    previous = -math.inf
    for index, _, points in sorted(curves, key=lambda curve: curve[2][0][1]):
        (x, value), rising = points[0], len(points) > 1 and points[1][1] > points[0][1]
        if len(points) > 1 and value - previous > line:
            axes.annotate(f"{value:.1f}", (x, value), xytext=(0, -8 if rising else 8), textcoords="offset points",
                          ha="center", va="top" if rising else "bottom", fontsize=8.5, color=model_colour(index),
                          annotation_clip=False)  # fmt: skip
            previous = value


def _name_ends(axes: Axes, ends: list[tuple[int, float, float, str]]) -> None:
    """Texts (place of the model, x, y, text) at the right of their points, pushed apart where they would overlap."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[2])
    lines = max(text.count("\n") + 1 for *_, text in ends)
    room = _in_points(axes, 13.5 * lines)
    heights: list[float] = []
    for _, _, value, _ in ends:
        heights.append(max(value, heights[-1] + room) if heights else value)
    # What was pushed over the top comes back down, taking its neighbours along.
    ceiling = axes.get_ylim()[1] - room / 4
    for number in reversed(range(len(heights))):
        heights[number] = min(heights[number], ceiling)
        ceiling = heights[number] - room
    right = max(x for _, x, _, _ in ends)
    for height, (index, _, _, text) in zip(heights, ends, strict=True):
        axes.annotate(text, (right, height), xytext=(11, 0), textcoords="offset points", va="center", ha="left",
                      color=model_colour(index), fontsize=9.5, linespacing=1.25, annotation_clip=False)  # fmt: skip


def _in_points(axes: Axes, points: float) -> float:
    """A height in printer's points, in units of the (linear) vertical axis."""
    low, high = axes.get_ylim()
    return points / (axes.get_window_extent().height / axes.figure.dpi * 72) * (high - low)


def _lay_out(figure: Figure) -> None:
    """Place the panels, so that lengths in points can be asked for: once for a figure, it is the slow part."""
    figure.draw_without_rendering()


def _key(axes: Axes) -> None:
    """The reading key, in grey under the curves, which sink at their ends."""
    from matplotlib.lines import Line2D

    style: dict[str, Any] = {"marker": "o", "ls": "", "ms": 5.5, "mec": _GREY, "mew": 1.3}
    handles = [
        Line2D([], [], mfc=_GREY, label="trained at this size", **style),
        Line2D([], [], mfc="white", label="never seen in training", **style),
    ]
    axes.legend(
        handles=handles,
        loc="lower center",
        frameon=False,
        fontsize=8.5,
        labelcolor=_GREY,
        handletextpad=0.1,
        borderpad=0.2,
    )


def _legend(axes: Axes, models: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=model_colour(index), marker=_MARKERS[index % len(_MARKERS)], ms=5.5, lw=1.8,
               ls=_LINES[index // len(COLOURS) % len(_LINES)])
        for index in range(len(models))
    ]  # fmt: skip
    legend = axes.legend(handles, map(str, range(len(models))), loc="best", frameon=False, fontsize=8.5)
    # Not as labels: matplotlib leaves out those that begin with an underscore.
    for text, model in zip(legend.get_texts(), models, strict=True):
        text.set_text(_label(model))


def _short(name: str) -> str:
    return shorten(printable(name), _LETTERS)


def _label(name: str) -> str:
    """What pictures call a model: a short line of letters that there are fonts for."""
    return shorten(drawable(_short(name)), _LETTERS)


def _milliseconds(row: Row) -> float:
    return 1e3 / (row.images_per_second or math.nan)


def _front(points: list[tuple[float, float, Row]]) -> list[tuple[float, float, Row]]:
    """The points that no other one beats in both time and accuracy, from fast to slow."""
    front: list[tuple[float, float, Row]] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front
