"""Results of a sweep: one row for each model and size, the CSV table, and summary statistics."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, fields
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
"""Titles of scores that tables show in brackets after the main one."""


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
    count: int  # images evaluated
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
    integers, optional_integers, texts = {"height", "width", "count", "bad"}, {"params"}, {"model", "note"}
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


@dataclass(frozen=True)
class Finding:
    """The main result in words: a headline and a few sentences that support or qualify it."""

    headline: str
    details: list[str]


def find(rows: list[Row], train_sizes: dict[str, list[Size]]) -> Finding:
    """Summarise the results in words, without favouring any model.

    A gap counts as clear if it exceeds two (binomial) standard errors of an accuracy on this number of images. This is
    conservative, because all models saw the same images. For scores that are not a fraction of images, the threshold
    is one point.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    means, sides = areas(rows)
    scored = {model: mean for model, mean in means.items() if mean is not None}
    if not scored:
        return _find_without_curves(rows, models)
    span = f"{sides[0]} to {sides[-1]} px"
    order = sorted(scored, key=lambda model: -scored[model])
    lead = order[0]
    curves = {
        model: {row.height: row.score for row in rows if row.model == model and row.square and row.score is not None}
        for model in scored
    }
    count = max(1, min(row.count for row in rows if row.score is not None))
    details: list[str] = []
    if len(order) == 1:
        curve = curves[lead]
        best, worst = max(curve, key=lambda side: curve[side]), min(curve, key=lambda side: curve[side])
        headline = f"{lead} averages {scored[lead]:.1f} % from {span}."
        details.append(
            f"Its best size is {best} px with {curve[best]:.1f} %, its worst {worst} px with {curve[worst]:.1f} %."
        )
    else:
        rival = _rival(lead, order, train_sizes)
        binomial = main_score(rows) == "top1"
        noise = _noise(scored[lead], count) if binomial else 1.0
        headline = _headline(lead, rival, scored, train_sizes, span, noise)
        details += _compare(lead, rival, curves, sides, count if binomial else None)
        details += [f"{model} averages {scored[model]:.1f} %." for model in order if model not in (lead, rival)]
        details.append(
            f"With {count:,} images, a difference below about {noise:.1f} points is within the noise."
            if binomial
            else "A difference below one point is treated as noise; the variance of this score was not measured."
        )
    details += _at_training_sizes(order, curves, train_sizes)
    for model in models:
        refused = [row for row in rows if row.model == model and row.score is None]
        if refused:
            details.append(
                f"{model} could not run at {len(refused)} of {sum(row.model == model for row in rows)} sizes."
            )
    return Finding(headline, details)


def _find_without_curves(rows: list[Row], models: list[str]) -> Finding:
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
        ["The models have fewer than two square sizes in common, so there is no curve to summarise."],
    )


def _is_multi(model: str, train_sizes: dict[str, list[Size]]) -> bool:
    return len(train_sizes.get(model, [])) > 1


def _rival(lead: str, order: list[str], train_sizes: dict[str, list[Size]]) -> str:
    """Return the best model of the other kind (one versus several training sizes), the comparison of most interest.

    If all models are of the same kind, return the best of the others.
    """
    others = [model for model in order if model != lead]
    of_other_kind = [model for model in others if _is_multi(model, train_sizes) != _is_multi(lead, train_sizes)]
    return (of_other_kind or others)[0]


def _headline(
    lead: str, rival: str, means: dict[str, float], train_sizes: dict[str, list[Size]], span: str, noise: float
) -> str:
    ours, theirs = f"{means[lead]:.1f} %", f"{means[rival]:.1f} %"
    if means[lead] - means[rival] < noise:
        return f"No clear difference from {span}: {lead} averages {ours}, {rival} {theirs}."
    multi_lead, multi_rival = _is_multi(lead, train_sizes), _is_multi(rival, train_sizes)
    if multi_lead and not multi_rival:
        return f"From {span}, {lead} keeps {ours} on average; {rival}, trained at one size, keeps {theirs}."
    if multi_rival and not multi_lead:
        return f"Multi-resolution training did not pay off here: from {span}, {lead} averages {ours}, {rival} {theirs}."
    return f"From {span}, {lead} averages {ours}, ahead of {rival} with {theirs}."


def _compare(
    lead: str, rival: str, curves: dict[str, dict[int, float]], sides: list[int], count: int | None
) -> list[str]:
    gaps = {side: curves[lead][side] - curves[rival][side] for side in sides}
    widest = max(gaps, key=lambda side: gaps[side])
    sentences = []
    if gaps[widest] > 0:
        sentences.append(
            f"The gap is widest at {widest} px: {curves[lead][widest]:.1f} % against {curves[rival][widest]:.1f} %."
        )
    behind = [side for side in sides if gaps[side] < 0]
    if behind:
        worst = min(behind, key=lambda side: gaps[side])
        noise = 1.0 if count is None else _noise(curves[lead][worst], count)
        clear = "" if -gaps[worst] > noise else " (within the noise)"
        where = f"at {worst} px" if len(behind) == 1 else f"at {len(behind)} of {len(sides)} sizes, most at {worst} px"
        sentences.append(
            f"{rival} is ahead {where}: {curves[rival][worst]:.1f} % against {curves[lead][worst]:.1f} %{clear}."
        )
    else:
        sentences.append(f"{rival} is ahead at none of the {len(sides)} sizes.")
    return sentences


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


def _noise(percent: float, count: int) -> float:
    """Return two standard errors of a measured accuracy, in percentage points; at least the share of one image."""
    share = min(max(percent / 100, 0.0), 1.0)
    return max(200 * math.sqrt(share * (1 - share) / count), 100 / count)
