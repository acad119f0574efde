"""Results of a sweep: one row for each model and size, the CSV table, and summary statistics."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path

from anyres.errors import UserError
from anyres.io.files import atomic_write
from anyres.io.text import csv_text, from_csv
from anyres.shapes import Size
from anyres.tasks import TASKS

TITLES = {name: titles[0] for task in TASKS.values() for name, titles in task.titles.items()}
"""Titles of the main scores in plots and reports."""
SHORT_TITLES = {name: titles[1] for task in TASKS.values() for name, titles in task.titles.items()}
SECOND_TITLES = {name: title for task in TASKS.values() for name, title in task.second_titles.items()}
"""Titles of secondary scores, which tables show in brackets after the main score."""
PART_TITLES = {name: title for task in TASKS.values() for name, title in task.part_titles.items()}
"""Titles of scores for parts of the data."""


@dataclass(frozen=True)
class Row:
    """The results of one model at one size.

    If the model cannot run at this size, `scores` is empty and `note` gives the reason. Otherwise `note` says what the
    scores leave out, if anything.
    """

    model: str
    height: int
    width: int
    trained: bool  # whether the model was trained at this size
    scores: dict[str, float]  # as in `tasks.scores.Measured`
    low: float | None = field(default=None, kw_only=True)
    """Lower end (`high`: upper end) of the main score's 95 % confidence interval over images, or range over runs."""
    high: float | None = field(default=None, kw_only=True)
    runs: int = field(default=1, kw_only=True)  # number of runs that the scores are the mean of
    count: int  # images evaluated
    of: int | None = field(default=None, kw_only=True)  # images in the data; None if unknown
    bad: int  # images skipped because they could not be read
    gflops: float | None  # per image; 2 × multiply-adds
    params: int | None
    images_per_second: float | None  # median, in batches
    latency_ms: float | None  # median, one image alone
    peak_memory_mb: float | None  # weights + input + activations of one batch, 10^6 bytes
    note: str = ""

    @property
    def score(self) -> float | None:
        """The main score in percent; None if the model cannot run."""
        return next(iter(self.scores.values()), None)

    @property
    def size(self) -> Size:
        """(height, width)."""
        return self.height, self.width

    @property
    def square(self) -> bool:
        """Whether the height equals the width."""
        return self.height == self.width

    @property
    def side(self) -> float:
        """Side of the square with the same area, in pixels."""
        return math.sqrt(self.height * self.width)


_FIRST, _LAST = (
    [field.name for field in part]
    for part in (fields(Row)[:4], fields(Row)[5:])  # before and after `scores`
)


def score_names(rows: list[Row]) -> list[str]:
    """Return the names of all scores, the main one first."""
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def main_score(rows: list[Row]) -> str:
    """Return the name of the main score; "top1" if no model could run."""
    return next(iter(score_names(rows)), "top1")


def write_csv(rows: list[Row], path: str | Path) -> None:
    """Write the rows as a CSV table with a column for each field of `Row` and each score.

    None becomes an empty cell, and numbers keep all their digits. See `csv_text` for how names are written.
    """
    names = score_names(rows)
    table = [
        [*(getattr(row, name) for name in _FIRST), *map(row.scores.get, names), *(getattr(row, name) for name in _LAST)]
        for row in rows
    ]
    with atomic_write(path, "sweep") as temporary:
        text = csv_text([[*_FIRST, *names, *_LAST], *(map(_to_cell, values) for values in table)])
        temporary.write_text(text, encoding="utf-8")


def read_csv(path: str | Path) -> list[Row]:
    """Read a table written by `write_csv`, without loss of digits. Raises UserError for a table of another kind."""
    with Path(path).open(newline="", encoding="utf-8") as handle:
        table = csv.DictReader(handle)
        names = list(table.fieldnames or [])
        if names[: len(_FIRST)] != _FIRST or names[-len(_LAST) :] != _LAST:
            raise UserError(
                f"{path} is not a sweep table: its first line must be {','.join(_FIRST)},SCORES,{','.join(_LAST)}"
            )
        return [row_from_cells(cells) for cells in table]


def row_from_cells(cells: dict[str, str]) -> Row:
    """Build a row from the text cells of the table."""
    integers, optional_integers = {"height", "width", "count", "bad", "runs"}, {"params", "of"}
    texts = {"model", "note"}
    values: dict[str, object] = {}
    scores: dict[str, float] = {}
    for name, cell in cells.items():
        if name not in _FIRST and name not in _LAST:
            scores |= {name: float(cell)} if cell else {}
        elif name in texts:
            values[name] = from_csv(cell)
        elif name == "trained":
            values[name] = cell == "yes"
        elif name in integers or (name in optional_integers and cell):
            values[name] = int(cell)
        else:
            values[name] = float(cell) if cell else None
    return Row(**values, scores=scores)  # type: ignore[arg-type]


def _to_cell(value: object) -> object:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def card_table(rows: list[Row], source: str) -> tuple[str, list[list[str]]]:
    """Return a sentence about the rows of one model, and their table, for its model card."""
    counts = {(row.count, row.of) for row in rows if row.score is not None}
    shares = [f"{count:,}" if of in (None, count) else f"{count:,} of {of:,}" for count, of in sorted(counts, key=str)]
    about = f"{TITLES[main_score(rows)]} in percent on {' or '.join(shares) or 'no'} images of {source}."
    lines = [
        [
            str(row.height) if row.square else f"{row.height}×{row.width}",
            row.note if row.score is None else f"{row.score:.1f}",
            "" if row.low is None or row.high is None else f"{row.low:.1f}–{row.high:.1f}",
            "yes" if row.trained else "no",
        ]
        for row in rows
    ]
    return about, [["size (px)", SHORT_TITLES[main_score(rows)], "95 % interval", "trained at it"], *lines]


def area_over_log_size(accuracy: dict[int, float]) -> float:
    """Return the area under the curve of accuracy over log2(side), divided by the width of the range.

    The result is a mean in the unit of the accuracy. The area is computed from trapezoids between neighbouring sides,
    so unlike a mean over the sizes it does not depend on how densely a part of the range is sampled.

    Args:
        accuracy: maps the side of a square input to percent; needs at least two sides.
    """
    if len(accuracy) < 2:
        raise ValueError(f"the area under a curve needs at least two sizes, got {sorted(accuracy)}")
    sides = sorted(accuracy)
    steps = [(math.log2(right / left), (accuracy[left] + accuracy[right]) / 2) for left, right in pairwise(sides)]
    return sum(width * height for width, height in steps) / math.log2(sides[-1] / sides[0])


def areas(rows: list[Row]) -> tuple[dict[str, float | None], list[int]]:
    """Return the area under the curve of every model, and the sides that it was computed over.

    All models are compared over the same square sizes: those that are supported by every model that runs at two or
    more square sizes. The area is None for a model that runs at fewer than two, and for every model if fewer than two
    sizes are common.
    """
    curves: dict[str, dict[int, float]] = {row.model: {} for row in rows}
    for row in rows:
        if row.square and row.score is not None:
            curves[row.model][row.height] = row.score
    compared = {model: curve for model, curve in curves.items() if len(curve) >= 2}
    common = sorted(set.intersection(*(set(curve) for curve in compared.values()))) if compared else []
    if len(common) < 2:
        return dict.fromkeys(curves), []
    return {
        model: area_over_log_size({side: curve[side] for side in common}) if model in compared else None
        for model, curve in curves.items()
    }, common


LEVEL = 0.05
"""Level of significance."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of a sweep's first model with another one at a size."""

    first: str
    other: str
    size: Size
    gap: float
    """Main score of the first model minus that of the other, in percentage points."""
    p: float | None
    """Two-sided p-value, corrected for all comparisons of the sweep by Holm's method; None if no test is possible."""

    @property
    def clear(self) -> bool:
        """Whether the difference is statistically significant."""
        return self.p is not None and self.p < LEVEL


@dataclass(frozen=True)
class Finding:
    """The main result in words: a headline and a few sentences that support or qualify it."""

    headline: str
    details: list[str]


def find(
    rows: list[Row], train_sizes: dict[str, list[Size]], comparisons: Sequence[Comparison] = (), test: str = ""
) -> Finding:
    """Summarise the results in words, without favouring any model.

    The first model is compared with every other one. The headline names only differences that are significant in a
    test: `comparisons` are its results and `test` is its name.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    means, sides = areas(rows)
    scored = {model: mean for model, mean in means.items() if mean is not None}
    if not scored:
        return _find_without_curves(rows, models, comparisons)
    span = f"from {sides[0]} to {sides[-1]} px"
    curves = {
        model: {row.height: row.score for row in rows if row.model == model and row.square and row.score is not None}
        for model in scored
    }
    details: list[str] = []
    if len(models) == 1:
        (model,) = models
        curve = curves[model]
        best, worst = max(curve, key=lambda side: curve[side]), min(curve, key=lambda side: curve[side])
        headline = f"{model} averages {scored[model]:.1f} % {span}."
        details.append(
            f"Its best size is {best} px with {curve[best]:.1f} %, its worst {worst} px with {curve[worst]:.1f} %."
        )
    else:
        headline = _headline(models, scored, span, comparisons)
        listed = ", ".join(f"{model} {mean:.1f} %" for model, mean in sorted(scored.items(), key=lambda one: -one[1]))
        details.append(f"The mean over log size {span}: {listed}.")
        details += [sentence for other in models[1:] if (sentence := _widest(other, comparisons))]
        details.append(_tested(comparisons, test))
    details += _at_training_sizes(list(scored), curves, train_sizes)
    for model in models:
        several = max(row.runs for row in rows if row.model == model)
        if several > 1:
            details.append(f"{model} is the mean of {several} runs.")
        refused = [row for row in rows if row.model == model and row.score is None]
        if refused:
            details.append(
                f"{model} could not run at {len(refused)} of {sum(row.model == model for row in rows)} sizes."
            )
    return Finding(headline, details)


def _find_without_curves(rows: list[Row], models: list[str], comparisons: Sequence[Comparison]) -> Finding:
    parts = []
    for model in models:
        best = max(
            (row for row in rows if row.model == model and row.score is not None),
            key=lambda row: row.score or 0.0,
            default=None,
        )
        parts.append(
            f"{model} could not run at any of the sizes"
            if best is None
            else f"{model} scores {best.score:.1f} % at {best.height}×{best.width} px"
        )
    return Finding(
        "; ".join(parts) + ".",
        [
            *(sentence for other in models[1:] if (sentence := _widest(other, comparisons))),
            "The models have fewer than two square sizes in common, so there is no curve to summarise.",
        ],
    )


def _headline(models: list[str], means: dict[str, float], span: str, comparisons: Sequence[Comparison]) -> str:
    """State the significant differences between the first model and the next three."""
    first, *others = models
    told = {model: f"{model} ({means[model]:.1f} %)" if model in means else model for model in models}
    sentences = []
    for other in others[:3]:
        own = [each for each in comparisons if each.other == other]
        ahead, behind = (sum(each.clear and each.gap * sign > 0 for each in own) for sign in (1, -1))
        if not any(each.p is not None for each in own):
            sentences.append(f"{told[first]} and {told[other]} were not tested for a difference")
        elif not ahead and not behind:
            sentences.append(f"no clear difference between {told[first]} and {told[other]} at any of {len(own)} sizes")
        elif ahead >= behind:
            rest = f"behind at {behind or 'none'}"
            sentences.append(f"{told[first]} is ahead of {told[other]} at {ahead} of {len(own)} sizes and {rest}")
        else:
            rest = f"ahead at {ahead or 'none'}"
            sentences.append(f"{told[first]} is behind {told[other]} at {behind} of {len(own)} sizes and {rest}")
    return f"{span[0].upper()}{span[1:]}: {'; '.join(sentences)}{'; and so on' * (len(others) > 3)}."


def _widest(other: str, comparisons: Sequence[Comparison]) -> str:
    """State the largest significant lead and deficit of the first model against another, with their sizes."""
    own = [each for each in comparisons if each.other == other and each.clear]
    places = []
    for each, word in ((max(own, key=lambda one: one.gap, default=None), "ahead"),
                       (min(own, key=lambda one: one.gap, default=None), "behind")):  # fmt: skip
        if each is not None and (each.gap > 0) == (word == "ahead") and each.gap:
            size = "×".join(map(str, dict.fromkeys(each.size)))
            places.append(f"most {word}, by {abs(each.gap):.1f} points, at {size} px")
    return f"{own[0].first} is {' and '.join(places)} in comparison with {other}." if places else ""


def _tested(comparisons: Sequence[Comparison], test: str) -> str:
    count = sum(each.p is not None for each in comparisons)
    if not count:
        return "No test of differences is available here."
    return (
        f"Differences count where {test} supports them at 5 %, corrected for {count} comparisons (Holm)."
        if count > 1
        else f"A difference counts where {test} supports it at 5 %."
    )


def _at_training_sizes(
    order: list[str], curves: dict[str, dict[int, float]], train_sizes: dict[str, list[Size]]
) -> list[str]:
    sentences = []
    for model in order:
        sides = [height for height, width in train_sizes.get(model, []) if height == width and height in curves[model]]
        if not sides:
            continue
        values = sorted(curves[model][side] for side in sides)
        listed = ", ".join(map(str, sorted(sides)))
        scores = f"{values[0]:.1f} %" if len(values) == 1 else f"{values[0]:.1f}–{values[-1]:.1f} %"
        sentences.append(f"At its training size{'s' * (len(sides) > 1)} ({listed} px) {model} reaches {scores}.")
    return sentences
