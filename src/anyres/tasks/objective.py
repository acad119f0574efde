"""What a training step minimises, as the loop sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

Outputs = dict[str, Tensor]
"""What a network's `forward_train` returns, by name."""


class Objective(ABC):
    """The loss of a task for one run."""

    def mix(self, views: list[Any], targets: list[Any], epoch: int, step: int) -> tuple[list[Any], list[Any]]:
        """Views and targets on the device as the loss takes them."""
        return views, targets

    @abstractmethod
    def __call__(self, outputs: Outputs, target: Any, view: Any) -> Tensor:
        """(outputs of `forward_train`, target, view) → scalar."""
