"""Significance of differences between models: paired tests on the same images, for each size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from anyres.evaluation.results import Comparison, Row
from anyres.shapes import Size
from anyres.tasks.evidence import Evidence, holm, p_value

Kept = Mapping[tuple[str, Size], Evidence]
"""The predictions of models, by (model, size)."""


def compare(rows: Sequence[Row], evidence: Kept, groups: Mapping[str, Sequence[str]]) -> list[Comparison]:
    """Compare the first model of `rows` with every other one, at every size at which both run.

    `groups` maps models that combine several runs to the names of the runs in `evidence`.
    """
    scores = {(row.model, row.size): row.score for row in rows if row.score is not None}
    models = list(dict.fromkeys(row.model for row in rows))
    found: list[Comparison] = []
    for other in models[1:]:
        for size in dict.fromkeys(row.size for row in rows):
            if (models[0], size) not in scores or (other, size) not in scores:
                continue
            gap = scores[models[0], size] - scores[other, size]
            sides = [[evidence.get((run, size)) for run in groups.get(model, [model])] for model in (models[0], other)]
            known = [[each for each in side if each is not None] for side in sides]
            tested = all(known) and [*map(len, known)] == [*map(len, sides)]
            found.append(Comparison(models[0], other, size, gap, p_value(*known) if tested else None))
    tested_ones = [comparison.p for comparison in found if comparison.p is not None]
    corrected = iter(holm(tested_ones))
    return [each if each.p is None else replace(each, p=next(corrected)) for each in found]


def merged(rows: Sequence[Row], groups: Mapping[str, Sequence[str]]) -> list[Row]:
    """Return the rows with those of a group's runs merged into one.

    Its scores are means, and `low` and `high` are the smallest and the largest main score of the runs.
    """
    of_group = {run: group for group, runs in groups.items() for run in runs}
    parts: dict[tuple[str, Size], list[Row]] = {}
    for row in rows:
        parts.setdefault((of_group.get(row.model, row.model), row.size), []).append(row)
    return [runs[0] if model not in groups else _mean(model, runs) for (model, _), runs in parts.items()]


def _mean(model: str, runs: list[Row]) -> Row:
    able = [row for row in runs if row.score is not None]
    if len(able) < len(runs):
        return replace(next(row for row in runs if row.score is None), model=model, runs=len(runs))
    scores = [row.score or 0.0 for row in able]

    def mean(name: str) -> float | None:
        values = [getattr(row, name) for row in able]
        return None if None in values else sum(values) / len(values)

    return replace(
        able[0],
        model=model,
        trained=all(row.trained for row in able),
        scores={name: sum(row.scores[name] for row in able) / len(able) for name in able[0].scores},
        low=min(scores),
        high=max(scores),
        runs=len(able),
        note="; ".join(dict.fromkeys(row.note for row in able if row.note)),
        gflops=mean("gflops"),
        images_per_second=mean("images_per_second"),
        latency_ms=mean("latency_ms"),
        peak_memory_mb=mean("peak_memory_mb"),
    )
