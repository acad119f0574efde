"""The plots of a sweep: accuracy by size, accuracy against time, and cost by size.

In all of them, filled markers are sizes that the model was trained at, and hollow ones are sizes unseen in training.
Bands and bars are the intervals of the rows: 95 % over images, or the range over several runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import IO, TYPE_CHECKING, Literal

from anyres.evaluation.aspects import aspect_name, size_name
from anyres.evaluation.plot_labels import (
    label_dots,
    label_ends,
    label_sizes,
    mark_training_sizes,
    model_legend,
    name_ends,
    plain_log_ticks,
    reading_key,
    room_for_marks,
    size_axis,
    time_axis,
)
from anyres.evaluation.plot_style import COLOURS, GRID, LINES, MARKERS, drawn_name, model_colour, style
from anyres.evaluation.results import SHORT_TITLES, TITLES, Row, main_score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NON_SQUARE_DOTS = 12  # with more non-square sizes than this, draw curves in one small panel per aspect ratio


Published = Mapping[str, Mapping[int, float]]
"""Published scores of models, by side of the input."""


def accuracy_figure(
    rows: list[Row], train_sides: dict[str, list[int]], published: Published | None = None, narrow: bool = False
) -> Figure:
    """Plot the main score over the side of a square input, with non-square sizes to the right (below if `narrow`).

    Args:
        train_sides: sides of each model's square training sizes, marked in its colour below the axis.
        published: published scores, drawn as crosses in the colour of the model.
    """
    squares = [row for row in rows if row.square]
    others = [row for row in rows if not row.square]
    models = _models(rows)
    with style(models):
        panels = _non_square_panels(others)
        figure, main, beside = _accuracy_layout(bool(squares), panels, narrow)
        curves: list[tuple[Axes, list[Row]]] = []
        marked = {index: train_sides[model] for index, model in enumerate(models) if train_sides.get(model)}
        crosses = [(index, side, score) for index, model in enumerate(models)
                   for side, score in (published or {}).get(model, {}).items()]  # fmt: skip
        if main is not None:
            curves.append((main, squares))
            main.set_xlabel("input size (px, square, log scale)")
            main.set_title(_title(rows), loc="left")
            room_for_marks(main, len(marked))
            for index, side, score in crosses:
                main.plot(side, score, "x", ms=7, mew=1.6, color=model_colour(index), zorder=4)
            reading_key(figure, rows, bool(marked), bool(crosses), 1 if narrow else 3)
        for axes, (title, part) in zip(beside, panels, strict=True):
            if title is None:
                _draw_dots(axes, part, models)
            else:
                curves.append((axes, part))
                axes.set_title(f"{title} (width:height)", loc="left")
                axes.set_xlabel("side of the square of equal area (px)")
        for axes, part in curves:
            _draw_by_side(axes, part, models)
            _limit_accuracy(axes, rows, [score for *_, score in crosses] if axes is main else [])
        _lay_out(figure)
        for axes, (title, part) in zip(beside, panels, strict=True):
            if title is None:
                label_dots(axes, part, models)
        for axes, part in curves:
            sides = sorted({round(row.side) for row in part})
            if axes is main:
                sides = sorted({*sides, *(side for _, side, _ in crosses)})
            size_axis(axes, sides, {side for own in marked.values() for side in own} if axes is main else set())
            if axes is main:
                mark_training_sizes(axes, sides, marked)
            if axes is main or main is None:
                label_ends(axes, part, models)
        return figure


def pareto_figure(rows: list[Row], narrow: bool = False) -> Figure:
    """Plot the main score against the measured time per image; the grey line is the Pareto front."""
    timed = [row for row in rows if row.square and row.score is not None and row.images_per_second]
    models = _models(rows)
    with style(models):
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
        _limit_accuracy(axes, timed, [])
        time_axis(axes, [x for x, _, _ in points])
        note = "\nsmall numbers: input size (px)" + (
            f"{chr(10) if narrow else '; '}grey: the most accurate for the time" if len(front) > 1 else ""
        )
        axes.set_xlabel("time per image (ms, in batches, log scale)" + note, linespacing=1.5)
        axes.set_title(_title(rows), loc="left")
        _lay_out(figure)
        label_sizes(axes, points, on_front, models)
        last = [
            max((point for point in points if point[2].model == model), key=lambda point: point[2].height, default=None)
            for model in models
        ]
        name_ends(
            axes, [(index, end[0], end[1], f"   {drawn_name(end[2].model)}") for index, end in enumerate(last) if end]
        )
        return figure


def cost_figure(rows: list[Row], train_sides: dict[str, list[int]], narrow: bool = False) -> Figure:
    """Plot images per second, GFLOPs and peak memory over the side of a square input, in three small panels."""
    squares = [row for row in rows if row.square]
    models = _models(rows)
    trained = {side for sides in train_sides.values() for side in sides}
    panels = (
        ("images_per_second", "Images per second"),
        ("gflops", "GFLOP per image"),
        ("peak_memory_mb", "Peak memory (MB)"),
    )
    with style(models):
        figure = _empty_figure((4.6, 8.0) if narrow else (10.0, 3.1))
        grid = figure.subplots(3, 1) if narrow else figure.subplots(1, 3)
        for axes, (name, title) in zip(grid, panels, strict=True):
            for index, model in enumerate(models):
                curve = [(row.height, getattr(row, name), row.trained) for row in squares if row.model == model]
                # Models of the same width and depth cost the same; draw earlier ones larger so that they stay visible.
                known: list[tuple[float, float, bool]] = sorted((x, y, trained) for x, y, trained in curve if y)
                _curve(axes, known, index, marker_size=max(3.5, 9.0 - 3.0 * index), width=max(1.2, 4.5 - 1.7 * index))
            axes.set_yscale("log")
            plain_log_ticks(axes.yaxis)
            axes.set_title(title, loc="left")
            axes.set_xlabel("input size (px)")
        _lay_out(figure)
        for axes in grid:
            size_axis(axes, sorted({row.height for row in squares}), trained)
        model_legend(grid[0], models)
        return figure


def save(figure: Figure, target: str | PathLike[str] | IO[bytes], kind: Literal["png", "svg"] = "png") -> None:
    """Save a figure as PNG at 200 dpi, or as SVG with text as outlines, so that it looks the same everywhere."""
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else {"Software": None}
    with style():
        figure.savefig(target, format=kind, dpi=200, metadata=metadata)


def _empty_figure(inches: tuple[float, float]) -> Figure:
    # Not pyplot, which keeps global state and may need a display.
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
    """Return (title, rows) per panel: a single panel of dots (title None) for few sizes, else one per aspect ratio."""
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
    """Create the figure, its main panel, and a column of non-square panels to its right (below it if `narrow`)."""
    count = len(panels)
    dots = count == 1 and panels[0][0] is None
    shapes = len({row.size for row in panels[0][1]}) if dots else 0
    tall = 0.46 + 0.09 * len({row.model for row in panels[0][1]}) if dots else 0.0  # room for numbers above and below
    if narrow:
        below = (1.0 + tall * shapes) if dots else 2.4 * count
        figure = _empty_figure((4.6, (4.2 if squares else 0.0) + (below if count else 0.0)))
        heights = ([4.2] if squares else []) + ([below] if dots else [2.4] * count)
        column = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        return (figure, column[0], column[1:]) if squares else (figure, None, column)
    if not squares:
        figure = _empty_figure((7.2, max(2.0, tall * shapes + 1.0) if dots else 3.0 * count))
        return figure, None, list(figure.subplots(count, 1, squeeze=False)[:, 0])
    if not count:
        figure, axes = _figure((7.6, 4.4))
        return figure, axes, []
    height = 4.4 if count < 3 else 1.9 * count
    figure = _empty_figure((10.6, height))
    if dots:  # only as high as needed, not stretched to the height of the curves
        share = min(0.99, (1.3 + tall * shapes) / height)
        grid = figure.add_gridspec(2, 2, width_ratios=[2.7, 1], height_ratios=[share, 1 - share])
        return figure, figure.add_subplot(grid[:, 0]), [figure.add_subplot(grid[0, 1])]
    grid = figure.add_gridspec(count, 2, width_ratios=[2.7, 1])
    return figure, figure.add_subplot(grid[:, 0]), [figure.add_subplot(grid[index, 1]) for index in range(count)]


def _draw_by_side(axes: Axes, rows: list[Row], models: list[str]) -> None:
    for index, model in reversed(list(enumerate(models))):  # the first model is drawn last, on top
        _curve(
            axes,
            sorted((row.side, row.score, row.trained) for row in rows if row.model == model and row.score is not None),
            index,
        )
        spans = sorted(
            (row.side, row.low, row.high)
            for row in rows
            if row.model == model and row.low is not None and row.high is not None
        )
        if len(spans) > 1:
            sides, lows, highs = zip(*spans, strict=True)
            axes.fill_between(sides, lows, highs, color=model_colour(index), alpha=0.13, lw=0, zorder=2)
        else:
            for x, low, high in spans:
                axes.plot([x, x], [low, high], color=model_colour(index), lw=1.2, zorder=2)


def _curve(
    axes: Axes, points: list[tuple[float, float, bool]], index: int, marker_size: float = 6.2, width: float = 1.8
) -> None:
    colour, marker = model_colour(index), MARKERS[index % len(MARKERS)]
    line = LINES[index // len(COLOURS) % len(LINES)]
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
    for index, model in enumerate(models):
        colour, marker = model_colour(index), MARKERS[index % len(MARKERS)]
        # Bars of models with nearly the same score would hide each other on one line.
        shift = 0.12 * (index - (len(models) - 1) / 2) / max(1, len(models) / 3)
        for row in rows:
            if row.model != model or row.score is None:
                continue
            y = place[row.size] - shift
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [y, y], color=colour, lw=1.2, zorder=3)
            face = colour if row.trained else "white"
            axes.plot(row.score, y, marker, ms=6.5, mec=colour, mew=1.5, mfc=face, zorder=4)
    axes.set_yticks(list(place.values()), [f"{size_name(*size)}\n{aspect_name(*size)}" for size in place])
    axes.set_ylim(-0.7, len(sizes) - 0.3)
    values = [value for row in rows for value in (row.score, row.low, row.high) if value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 100.0)
    margin = max(2.0, 0.18 * (high - low))
    axes.set_xlim(low - margin, high + margin)
    axes.spines["left"].set_visible(False)
    axes.xaxis.grid(True, color=GRID, lw=0.8)
    axes.set_title("Non-square sizes", loc="left")
    axes.set_xlabel(f"{SHORT_TITLES[main_score(rows)]} (%), height×width")


def _limit_accuracy(axes: Axes, rows: list[Row], more: list[float]) -> None:
    values = [value for row in rows for value in (row.score, row.low, row.high) if value is not None] + more
    values = values or [0.0, 100.0]
    low, high = min(values), max(values)
    margin = max(1.5, 0.1 * (high - low))
    axes.set_ylim(max(0.0, low - margin) if low >= margin else -1.0, min(101.0, high + margin))
    axes.yaxis.grid(True, color=GRID, lw=0.8)
    axes.spines["left"].set_visible(False)


def _lay_out(figure: Figure) -> None:
    """Lay out the panels, so that lengths in points are known. Call once per figure, because it is slow."""
    figure.draw_without_rendering()


def _milliseconds(row: Row) -> float:
    return 1e3 / (row.images_per_second or math.nan)


def _front(points: list[tuple[float, float, Row]]) -> list[tuple[float, float, Row]]:
    """Return the Pareto front, from fast to slow: the points that no other one beats in both time and accuracy."""
    front: list[tuple[float, float, Row]] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front
