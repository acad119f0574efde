"""What an evaluation adds up, batch by batch and over processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from anyres.data.samples import EvalBatch


@dataclass(frozen=True)
class Measured:
    """What a model scored on a data set at one size."""

    scores: dict[str, float]
    """In percent except "loss"; the main one first."""
    count: int
    """Images or clips evaluated."""
    bad_images: tuple[str, ...] = ()
    """"name: reason" of those skipped because they could not be read."""
    note: str = ""
    """What the scores leave out, such as classes that are not there."""
    by_class: dict[str, float | None] = field(default_factory=dict)
    """A score of each class, where the task has one; None for classes that there is nothing to say about."""


def covered(score: str, found: int, classes: int, why: str) -> str:
    """The `note` on a score that is the mean over `found` of the `classes`."""
    return f"{score} is the mean over {found} of {classes} classes: {why}" if found < classes else ""


class Metric(ABC):
    """The scores of one source. Every process has its own and updates it with its share of the batches."""

    @abstractmethod
    def update(self, outputs: Any, batch: EvalBatch) -> None:
        """Add what `Task.forward` said about a batch with labels."""

    @abstractmethod
    def share(self) -> Any:
        """What this process added up: picklable, nothing on a device."""

    @abstractmethod
    def compute(self, shares: list[Any], count: int) -> Measured:
        """The scores from what all processes added up over `count` items. Raises UserError where there is nothing to
        judge by."""
