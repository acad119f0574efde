"""Training loss of tasks with one label per image or clip."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anyres.data import Mixing
from anyres.tasks.losses import soft_cross_entropy
from anyres.tasks.objective import Objective, Outputs
from anyres.tasks.options import LabelOptions


class LabelObjective(Objective):
    """Cross-entropy with mixup, CutMix and label smoothing."""

    def __init__(self, options: LabelOptions, source: Any) -> None:
        self.mixing = options.build(Mixing, num_classes=len(source.label_names))

    def mix(
        self, views: list[Tensor], targets: list[Tensor], epoch: int, step: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        return self.mixing(views, targets[0], epoch, step)

    def __call__(self, outputs: Outputs, target: Tensor, view: Tensor) -> Tensor:
        return soft_cross_entropy(outputs["logits"], target)
