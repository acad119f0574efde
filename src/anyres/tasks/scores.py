"""The interface of a metric, which is accumulated over batches and processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from anyres.data.samples import EvalBatch
from anyres.tasks.evidence import Evidence


@dataclass(frozen=True)
class Measured:
    """The scores of a model on a dataset at one size."""

    scores: dict[str, float]
    """In percent except "loss"; the main one first."""
    count: int
    """Number of evaluated images or clips."""
    bad_images: tuple[str, ...] = ()
    """"name: reason" of items that were skipped because they could not be read."""
    note: str = ""
    """Remark on what the scores leave out, such as classes that do not occur."""
    by_class: dict[str, float | None] = field(default_factory=dict)
    """Score of each class, if the task has one; None for classes without data."""
    evidence: Evidence | None = field(default=None, compare=False)
    """The answer to every item, if the task keeps it."""


def covered(score: str, found: int, classes: int, why: str) -> str:
    """Return the `note` on a score that is the mean over only `found` of the `classes`."""
    return f"{score} is the mean over {found} of {classes} classes: {why}" if found < classes else ""


class Metric(ABC):
    """Accumulates the scores on a source. Every process has its own and updates it with its share of the batches."""

    @abstractmethod
    def update(self, outputs: Any, batch: EvalBatch) -> None:
        """Add the outputs of `Task.forward` for a labelled batch."""

    @abstractmethod
    def share(self) -> Any:
        """Return this process's totals; they are picklable and not on a device."""

    @abstractmethod
    def compute(self, shares: list[Any], count: int) -> Measured:
        """Return the scores from the totals of all processes over `count` items.

        Raises UserError if the data have no labels to evaluate on.
        """
