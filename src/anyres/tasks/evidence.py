"""Predictions for every item of an evaluation, for intervals, paired tests and errors by class."""

from __future__ import annotations

import base64
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

_REPEATS = 1000
"""Number of bootstrap resamplings: enough for two digits of an interval."""


@dataclass(frozen=True)
class Evidence(ABC):
    """A model's predictions for the items at certain places in a source.

    Arrays have one row for each item, in ascending order of `places`.
    """

    test: ClassVar[str]
    """Name of the test for a difference between two models, to be used in a sentence."""
    test_of_runs: ClassVar[str]
    """The same for a difference between the means of several runs."""

    places: np.ndarray
    """(n,) int32."""

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """Return the constructor's array arguments by name."""

    @abstractmethod
    def interval(self) -> tuple[float, float]:
        """Return the 95 % confidence interval of the main score over images, in percent."""

    @abstractmethod
    def by_class(self) -> np.ndarray:
        """Return the score of each class in percent, (K,); NaN for a class without data."""

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Join the evidence of several processes."""
        merged = {name: np.concatenate([part.arrays()[name] for part in parts]) for name in parts[0].arrays()}
        order = np.argsort(merged["places"], kind="stable")
        return cls(**{name: array[order] for name, array in merged.items()})

    def at(self, places: np.ndarray) -> Self:
        """Return the part at these places, all of which must be present."""
        rows = np.searchsorted(self.places, places)
        return type(self)(**{name: array[rows] for name, array in self.arrays().items()})

    def pack(self) -> dict[str, Any]:
        """Return the evidence in a form for JSON, with compressed arrays."""
        packed = {
            name: [array.dtype.str, list(array.shape), base64.b64encode(zlib.compress(array.tobytes())).decode()]
            for name, array in self.arrays().items()
        }
        return {"kind": type(self).__name__, **packed}


@dataclass(frozen=True)
class Answers(Evidence):
    """For each item, its true class and the class that the model ranks first."""

    test = "McNemar's exact test on the same images"
    test_of_runs = "a normal test of the paired differences"

    truth: np.ndarray
    """(n,) int32."""
    predicted: np.ndarray
    """(n,) int32."""
    classes: np.ndarray
    """(n,) int32; the number of classes of the model."""

    def arrays(self) -> dict[str, np.ndarray]:
        return {"places": self.places, "truth": self.truth, "predicted": self.predicted, "classes": self.classes}

    @property
    def right(self) -> np.ndarray:
        """(n,) bool."""
        return self.truth == self.predicted

    @property
    def count(self) -> int:
        """Number of classes."""
        return int(self.classes.max())

    def interval(self) -> tuple[float, float]:
        return wilson(int(self.right.sum()), len(self.right))

    def by_class(self) -> np.ndarray:
        totals = np.bincount(self.truth, minlength=self.count)
        with np.errstate(invalid="ignore"):
            return 100 * np.bincount(self.truth, weights=self.right, minlength=self.count) / totals

    def confusion(self) -> np.ndarray:
        """Return the confusion matrix (K, K) int64, with labels as rows and predictions as columns."""
        pairs = self.truth.astype(np.int64) * self.count + self.predicted
        return np.bincount(pairs, minlength=self.count**2).reshape(self.count, self.count)


@dataclass(frozen=True)
class Regions(Evidence):
    """Numbers of pixels of each class in each item: in the intersection and in the union of label and prediction."""

    test = test_of_runs = "a paired bootstrap over the images"

    found: np.ndarray
    """(n, K) int32."""
    union: np.ndarray
    """(n, K) int32."""

    def arrays(self) -> dict[str, np.ndarray]:
        return {"places": self.places, "found": self.found, "union": self.union}

    def interval(self) -> tuple[float, float]:
        low, high = np.percentile(self.resampled(), [2.5, 97.5])
        return float(low), float(high)

    def by_class(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            share: np.ndarray = 100 * self.found.sum(0, dtype=np.int64) / self.union.sum(0, dtype=np.int64)
        return share

    def resampled(self) -> np.ndarray:
        """Return the mIoU in percent of items drawn with replacement, (_REPEATS,).

        The draws are the same for the same number of items.
        """
        n = len(self.places)
        weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_REPEATS).astype(np.float64)
        union = weights @ self.union
        with np.errstate(invalid="ignore", divide="ignore"):
            scores: np.ndarray = 100 * np.nanmean(np.where(union > 0, weights @ self.found / union, np.nan), axis=1)
        return scores


def unpack(packed: dict[str, Any]) -> Evidence:
    """Restore evidence from the output of `Evidence.pack`. Raises KeyError, TypeError or ValueError for other input."""
    packed = dict(packed)
    kind = {"Answers": Answers, "Regions": Regions}[packed.pop("kind")]
    arrays = {
        name: np.frombuffer(zlib.decompress(base64.b64decode(content)), np.dtype(dtype)).reshape(shape)
        for name, (dtype, shape, content) in packed.items()
    }
    return kind(**arrays)


def p_value(first: Sequence[Evidence], second: Sequence[Evidence]) -> float | None:
    """Return the two-sided p-value for the difference between two models, on the items that all runs have in common.

    Over images, this is McNemar's exact test for answers of one run each, a paired normal test for answers of several
    runs, and a paired bootstrap for regions. If a model has several runs, the pooled two-sample t-test over runs must
    also support the difference: the larger p-value is returned, because images alone say nothing about other seeds.
    None without common items.
    """
    every = [*first, *second]
    places = every[0].places
    for other in every[1:]:
        places = np.intersect1d(places, other.places)
    if not len(places):
        return None
    ours, theirs = ([each.at(places) for each in side] for side in (first, second))
    found = _over_items(ours, theirs)
    if len(every) == 2:
        return found
    return max(found, _over_runs(_scores(ours), _scores(theirs)))


def _scores(runs: Sequence[Evidence]) -> list[float]:
    return [100 * float(run.right.mean()) if isinstance(run, Answers) else float(np.nanmean(run.by_class()))
            for run in runs]  # fmt: skip


def _over_items(ours: Sequence[Evidence], theirs: Sequence[Evidence]) -> float:
    rights = [[run.right for run in side if isinstance(run, Answers)] for side in (ours, theirs)]
    if all(rights):
        if len(ours) == len(theirs) == 1:
            return mcnemar(
                *(int((a & ~b).sum()) for a, b in ((rights[0][0], rights[1][0]), (rights[1][0], rights[0][0])))
            )
        gaps = np.mean(rights[0], axis=0) - np.mean(rights[1], axis=0)
        spread = gaps.std(ddof=1) if len(gaps) > 1 else 0.0
        if spread == 0:
            return 1.0 if gaps.mean() == 0 else 0.0
        return math.erfc(abs(float(gaps.mean())) / float(spread) * math.sqrt(len(gaps) / 2))
    resampled = [np.mean([run.resampled() for run in side if isinstance(run, Regions)], 0) for side in (ours, theirs)]
    gaps = resampled[0] - resampled[1]
    below, above = int((gaps <= 0).sum()), int((gaps >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(gaps) + 1))


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval of a proportion, in percent (J. Am. Stat. Assoc. 22, 1927)."""
    z = 1.959964
    share, room = right / count, z * z / count
    middle = (share + room / 2) / (1 + room)
    half = z / (1 + room) * math.sqrt(share * (1 - share) / count + room / (4 * count))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    If two models are equally good, each is expected to have half of the items that only one of them has right.
    """
    total, fewer = first_only + second_only, min(first_only, second_only)
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def _over_runs(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the two-sided p-value of Student's two-sample t-test.

    If one model has a single run, the variance comes from the other's runs.
    """
    free = len(ours) + len(theirs) - 2
    means = [sum(side) / len(side) for side in (ours, theirs)]
    squares = sum((score - mean) ** 2 for side, mean in zip((ours, theirs), means, strict=True) for score in side)
    gap = abs(means[0] - means[1])
    error = math.sqrt(squares / free * (1 / len(ours) + 1 / len(theirs)))
    if error == 0:
        return 1.0 if gap == 0 else 0.0
    return student(gap / error, free)


def student(t: float, free: int) -> float:
    """Return the two-sided p-value of Student's t for `free` degrees of freedom (Abramowitz and Stegun, 26.7.3-4)."""
    angle = math.atan(t / math.sqrt(free))
    cosine, term, total = math.cos(angle), 1.0, 0.0
    for k in range(free % 2, free - 1, 2):  # powers of the cosine: 0, 2, … if `free` is even, 1, 3, … if it is odd
        term = term if k == 0 else cosine if k == 1 else term * cosine**2 * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if free % 2 else math.sin(angle) * total
    return max(0.0, 1 - inside)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for multiple tests by Holm's method (Scand. J. Stat. 6, 1979).

    If no difference is real, any of the corrected values is below 0.05 with a probability of at most 5 %.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
