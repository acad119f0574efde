"""The interface of a training loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

Outputs = dict[str, Tensor]
"""The outputs of a network's `forward_train`, by name."""


class Objective(ABC):
    """The loss of a task for one run."""

    def mix(self, views: list[Any], targets: list[Any], epoch: int, step: int) -> tuple[list[Any], list[Any]]:
        """Prepare views and targets on the device for the loss, for example with mixup."""
        return views, targets

    @abstractmethod
    def __call__(self, outputs: Outputs, target: Any, view: Any) -> Tensor:
        """Return the loss, a scalar, from the outputs of `forward_train`, the target and the view."""
