"""Errors by size for the report: class scores, confusions, and images that are right at one size but not at another."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from anyres.data import BadImage, MapSource, Source
from anyres.data.config import DataConfig
from anyres.data.decode import load_image
from anyres.evaluation.aspects import size_name
from anyres.evaluation.comparisons import Kept
from anyres.io.text import printable
from anyres.shapes import Size
from anyres.tasks.evidence import Answers, Evidence

CLASSES = 50
IMAGES = 60
THUMBNAIL_BYTES = 300_000


def class_errors(
    runs: Sequence[Sequence[str]],
    models: Mapping[str, nn.Module],
    evidence: Kept,
    sizes: Sequence[Size],
    source: Source,
    indices: Sequence[int] | None,
) -> dict[str, Any] | None:
    """Return the report's data on errors, ready for JSON; None if no predictions were kept.

    Args:
        runs: for each model of the report, the names of its one or several runs. Class scores are means over the runs
            and confusions are their sums; images are judged by the first run.
        evidence: the predictions, by (run, size).
        indices: indices of the source's items that were evaluated; None for all.

    Returns:
        "classes": names of the classes with the lowest mean scores, at most `CLASSES`. "total": number of all classes.
        "sizes": names. "scores"[model][size]: one number for each class, or null. "confusions"[model][size]: lists
        (label, answer, count), with answer -1 for any other class; empty unless the task has one answer per item.
        "images": name, label, picture and "answers"[model][size] of at most `IMAGES` items.
    """
    if not evidence:
        return None
    places = {name: DataConfig.of(model, source).places(source).tolist() for name, model in models.items()}
    total = len(source.label_names)
    scores = [[_scores([(evidence.get((run, size)), places[run]) for run in own]) for size in sizes] for own in runs]
    flat = np.array([one if one is not None else [math.nan] * total for model in scores for one in model])
    known = np.isfinite(flat).sum(0)
    means = np.where(known > 0, np.nansum(flat, 0) / np.maximum(known, 1), math.inf)
    worst = sorted(np.argsort(means, kind="stable")[:CLASSES].tolist())
    number = {label: place for place, label in enumerate(worst)}
    return {
        "classes": [printable(source.label_names[label]) for label in worst],
        "total": total,
        "sizes": [size_name(*size) for size in sizes],
        "scores": [
            [None if one is None else [_rounded(one[label]) for label in worst] for one in model] for model in scores
        ],
        "confusions": [
            [_confusions([(evidence.get((run, size)), places[run]) for run in own], number) for size in sizes]
            for own in runs
        ],
        "images": _images([own[0] for own in runs], places, evidence, sizes, source, indices),
    }


def _scores(runs: Sequence[tuple[Evidence | None, list[int]]]) -> list[float] | None:
    """Return the mean score of every class of the source."""
    found = [one.by_class()[places] for one, places in runs if one is not None]
    return np.mean(found, axis=0).tolist() if found else None


def _rounded(value: float) -> float | None:
    return round(value, 1) if math.isfinite(value) else None


def _confusions(runs: Sequence[tuple[Evidence | None, list[int]]], number: dict[int, int]) -> list[list[int]]:
    counts: dict[tuple[int, int], int] = {}
    for one, places in runs:
        if isinstance(one, Answers):
            label_of = {place: number.get(label, -1) for label, place in enumerate(places)}
            matrix = one.confusion()
            for truth, answer in np.argwhere(matrix).tolist():
                pair = label_of.get(truth, -1), label_of.get(answer, -1)
                if pair[0] >= 0:
                    counts[pair] = counts.get(pair, 0) + int(matrix[truth, answer])
    return [[*pair, count] for pair, count in counts.items()]


def _images(
    models: Sequence[str],
    places: Mapping[str, list[int]],
    evidence: Kept,
    sizes: Sequence[Size],
    source: Source,
    indices: Sequence[int] | None,
) -> list[dict[str, Any]]:
    """Select images that a model gets right at one size and wrong at another, evenly spread over the source."""
    if not isinstance(source, MapSource):
        return []
    answers: dict[int, list[list[str | None]]] = {}
    labels: dict[int, int] = {}
    changing: set[int] = set()
    for column, model in enumerate(models):
        label_of = {place: label for label, place in enumerate(places[model])}
        right: dict[int, set[bool]] = {}
        for row, size in enumerate(sizes):
            one = evidence.get((model, size))
            if not isinstance(one, Answers):
                continue
            columns = (one.places.tolist(), one.truth.tolist(), one.predicted.tolist())
            for item, truth, answer in zip(*columns, strict=True):
                cells = answers.setdefault(item, [[None] * len(sizes) for _ in models])
                known = label_of.get(answer)
                cells[column][row] = f"output {answer}" if known is None else printable(source.label_names[known])
                labels[item] = label_of[truth]
                right.setdefault(item, set()).add(truth == answer)
        changing |= {item for item, seen in right.items() if len(seen) == 2}
    ordered = sorted(changing)
    step = max(1.0, len(ordered) / IMAGES)
    chosen = [ordered[int(place * step)] for place in range(min(IMAGES, len(ordered)))]
    found: list[dict[str, Any]] = []
    room = THUMBNAIL_BYTES
    for item in chosen:
        entry = source.item(item if indices is None else indices[item])
        try:
            picture = _thumbnail(load_image(entry.data, entry.name, source.in_chans))
        except (BadImage, AttributeError, TypeError):  # a clip, not an image
            return []
        room -= len(picture)
        if room < 0:
            break
        found.append({
            "name": printable(entry.name),
            "label": printable(source.label_names[labels[item]]),
            "picture": picture,
            "answers": answers[item],
        })  # fmt: skip
    return found


def _thumbnail(image: Image.Image) -> str:
    """Encode with at most 96 pixels per side, as a data URI of PNG or JPEG, whichever is shorter."""
    image = image.copy()
    image.thumbnail((96, 96))
    coded = []
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 70})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        coded.append((len(buffer.getvalue()), kind.lower(), buffer.getvalue()))
    _, kind, content = min(coded)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
