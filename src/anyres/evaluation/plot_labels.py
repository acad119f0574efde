"""Labels of a sweep's plots: sizes, values and names, placed without overlaps."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from anyres.evaluation.plot_style import COLOURS, GREY, INK, LINES, MARKERS, drawn_name, model_colour
from anyres.evaluation.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KEPT_WIDTH = 0.6
"""Smallest share of a panel's width that remains when names are placed at the ends of the curves."""
_MARK_STEP = 6.0
"""Distance in points between the marks of one model below the axis and those of the next."""


def label_dots(axes: Axes, rows: list[Row], models: list[str]) -> None:
    """Write the values alternately above and below the dots of a panel, starting with the first models.

    Values that would overlap others are left out, because the tables contain them.
    """
    low, high = axes.get_xlim()
    room = 24 / (_KEPT_WIDTH * axes.get_window_extent().width / axes.figure.dpi * 72) * (high - low)
    sizes = list(dict.fromkeys(row.size for row in rows))
    for number, size in enumerate(sizes):
        taken: dict[bool, list[float]] = {True: [], False: []}
        for row in sorted((row for row in rows if row.size == size), key=lambda row: models.index(row.model)):
            value = row.score
            free = [] if value is None else [
                above for above in taken if all(abs(value - other) >= room for other in taken[above])
            ]  # fmt: skip
            if value is None or not free:
                continue
            above = free[0]
            taken[above].append(value)
            axes.annotate(f"{value:.1f}", (value, len(sizes) - 1 - number), xytext=(0, 11 if above else -11),
                          textcoords="offset points", ha="center", va="bottom" if above else "top", fontsize=8,
                          color=model_colour(models.index(row.model)))  # fmt: skip


def label_sizes(axes: Axes, points: list[tuple[float, float, Row]], on_front: set[int], models: list[str]) -> None:
    """Write the input size next to the points, the most informative ones first, skipping those that would overlap."""
    ends = {model: [row.height for _, _, row in points if row.model == model] for model in models}

    def rank(point: tuple[float, float, Row]) -> tuple[bool, bool, bool]:
        row = point[2]
        return row.height not in (min(ends[row.model]), max(ends[row.model])), not row.trained, id(row) not in on_front

    kept: list[tuple[float, float]] = []
    scale = 72 / axes.figure.dpi
    for x, y, row in sorted(points, key=rank):
        # Keep clear of the curve: above left on the Pareto front, otherwise below, left if the curve falls to this
        # point and right if it rises.
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


def label_ends(axes: Axes, rows: list[Row], models: list[str]) -> None:
    """Write the name and last value at the right end of every curve, and the first value at the left end."""
    curves = _curves(rows, models)
    line = _in_points(axes, 12)
    name_ends(
        axes,
        [
            (index, *points[-1], f"{drawn_name(model)}\n{points[-1][1]:.1f} at {round(points[-1][0])}")
            for index, model, points in curves
        ],
    )
    first = min((points[0][0] for *_, points in curves), default=0.0)
    taken: list[float] = []
    for index, _, points in curves:
        value = points[0][1]
        # Values that would overlap that of an earlier model are left out, because the tables contain them.
        if points[0][0] == first and len(points) > 1 and all(abs(value - other) >= line for other in taken):
            axes.annotate(f"{value:.1f}", (first, value), xytext=(-9, 0), textcoords="offset points", ha="right",
                          va="center", fontsize=8.5, color=model_colour(index), annotation_clip=False)  # fmt: skip
            taken.append(value)


def _curves(rows: list[Row], models: list[str]) -> list[tuple[int, str, list[tuple[float, float]]]]:
    """Return (index, model, [(side, main score), …]) for the models that have any value."""
    curves = []
    for index, model in enumerate(models):
        points = sorted((row.side, row.score) for row in rows if row.model == model and row.score is not None)
        if points:
            curves.append((index, model, points))
    return curves


def name_ends(axes: Axes, ends: list[tuple[int, float, float, str]]) -> None:
    """Write texts to the right of their points, moved apart where they overlap.

    Args:
        ends: (index of the model, x, y, text).
    """
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[2])
    lines = max(text.count("\n") + 1 for *_, text in ends)
    room = _in_points(axes, 13.5 * lines)
    heights: list[float] = []
    for _, _, value, _ in ends:
        heights.append(max(value, heights[-1] + room) if heights else value)
    # Move texts that were pushed over the top back down, together with their neighbours.
    ceiling = axes.get_ylim()[1] - room / 4
    for number in reversed(range(len(heights))):
        heights[number] = min(heights[number], ceiling)
        ceiling = heights[number] - room
    right = max(x for _, x, _, _ in ends)
    for height, (index, _, _, text) in zip(heights, ends, strict=True):
        axes.annotate(text, (right, height), xytext=(11, 0), textcoords="offset points", va="center", ha="left",
                      color=model_colour(index), fontsize=9.5, linespacing=1.25, annotation_clip=False)  # fmt: skip


def _in_points(axes: Axes, points: float) -> float:
    """Convert a height in typographic points to units of the (linear) vertical axis."""
    low, high = axes.get_ylim()
    return points / (axes.get_window_extent().height / axes.figure.dpi * 72) * (high - low)


def room_for_marks(axes: Axes, models: int) -> None:
    """Leave room between the axis and its labels to mark the training sizes of this number of models."""
    axes.tick_params(axis="x", pad=3.5 + _MARK_STEP * models)


def mark_training_sizes(axes: Axes, sides: list[int], marked: dict[int, list[int]]) -> None:
    """Mark the training sizes of each model below the axis, in its colour, with one line per model.

    Sizes outside the range of `sides` are left out.
    """
    height = axes.get_window_extent().height / axes.figure.dpi * 72
    for line, (index, own) in enumerate(marked.items()):
        inside = [side for side in own if sides[0] <= side <= sides[-1]]
        axes.scatter(inside, [-(_MARK_STEP * line + 6.5) / height] * len(inside), s=17, lw=0,
                     marker=MARKERS[index % len(MARKERS)], color=model_colour(index), clip_on=False,
                     transform=axes.get_xaxis_transform())  # fmt: skip


def size_axis(axes: Axes, sides: list[int], trained: Collection[int]) -> None:
    """Make a log2 axis with a tick at every size.

    If labels would overlap, those of training sizes and at the ends are kept. Labels of training sizes are bold.
    """
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    if not sides:
        return
    axes.set_xscale("log", base=2)
    spread = math.log2(sides[-1] / sides[0]) or 1.0
    width = _KEPT_WIDTH * axes.get_window_extent().width / axes.figure.dpi * 72
    before = 38 / (width - 38) * spread if len(sides) > 1 else 0.5  # room for the first values
    axes.set_xlim(sides[0] / 2**before, sides[-1] * 2 ** (0.05 * spread if len(sides) > 1 else 0.5))
    axes.xaxis.set_major_locator(FixedLocator(sides))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    # Leave room for the names at the ends of the curves.
    points = 0.85 * axes.get_window_extent().width / axes.figure.dpi * 72
    wanted = sorted(
        sides, key=lambda side: (side not in trained, side not in (sides[0], sides[-1]), -sides.index(side) % 2)
    )
    kept: list[int] = []
    for side in wanted:
        # A digit is about 5.6 points wide at this font size; leave a gap of about one digit between labels.
        need = 5.6 * (len(str(side)) + 1.2)
        if all(abs(math.log2(side / other)) / (1.15 * spread) * points >= need for other in kept):
            kept.append(side)
    axes.set_xticklabels([str(side) if side in kept else "" for side in sides])
    for label, side in zip(axes.get_xticklabels(), sides, strict=True):
        if side in trained:
            label.set_fontweight("bold")
            label.set_color(INK)


def time_axis(axes: Axes, times: list[float]) -> None:
    if times:
        low, high = min(times), max(times)
        spread = math.log2(high / low) or 1.0
        axes.set_xlim(low / 2 ** (0.09 * spread), high * 2 ** (0.09 * spread))
    plain_log_ticks(axes.xaxis)


def plain_log_ticks(axis: Any) -> None:
    """Put ticks at 1, 2, 5, 10, 20, … and write them without exponents."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def reading_key(figure: Figure, rows: list[Row], marked: bool, crosses: bool, columns: int) -> None:
    """Add the key to markers, bands and crosses below the panels, in `columns` columns."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    style: dict[str, Any] = {"marker": "o", "ls": "", "ms": 5.5, "mec": GREY, "mew": 1.3}
    handles: list[Any] = [
        Line2D([], [], mfc=GREY, label="trained at this size", **style),
        Line2D([], [], mfc="white", label="never seen in training", **style),
    ]
    if marked:
        small = {**style, "ms": 3.5, "mfc": GREY}
        handles.append(Line2D([], [], label="below the axis: a model's training sizes", **small))
    if crosses:
        handles.append(Line2D([], [], marker="x", ls="", ms=6, mec=GREY, mew=1.4, label="published accuracy"))
    runs = {row.runs > 1 for row in rows if row.low is not None}
    if runs:
        words = {False: "95 % interval over images", True: "range over runs"}
        handles.append(Patch(color=GREY, alpha=0.25, lw=0, label=", ".join(words[each] for each in sorted(runs))))
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=8.5,
                  labelcolor=GREY, handletextpad=0.4, columnspacing=1.6)  # fmt: skip


def model_legend(axes: Axes, models: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=model_colour(index), marker=MARKERS[index % len(MARKERS)], ms=5.5, lw=1.8,
               ls=LINES[index // len(COLOURS) % len(LINES)])
        for index in range(len(models))
    ]  # fmt: skip
    legend = axes.legend(handles, map(str, range(len(models))), loc="best", frameon=False, fontsize=8.5)
    # Set the names afterwards, because matplotlib ignores labels that begin with an underscore.
    for text, model in zip(legend.get_texts(), models, strict=True):
        text.set_text(drawn_name(model))
