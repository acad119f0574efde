"""Training of networks whose images or clips carry one label."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anyres.data import Augmentation, Mixing
from anyres.tasks.losses import soft_cross_entropy
from anyres.tasks.objective import Objective, Outputs
from anyres.tasks.options import LabelOptions


def augmentation(config: LabelOptions) -> Augmentation:
    """How training views of labelled images or clips are made."""
    return Augmentation(
        scale=(config.crop_scale[0], config.crop_scale[1]),
        ratio=(config.crop_ratio[0], config.crop_ratio[1]),
        hflip=config.hflip,
        auto_augment=config.auto_augment,
        color_jitter=config.color_jitter,
        erasing=config.erasing,
        interpolation=config.interpolation,
        separate=config.separate_aug,
    )


def mixing(config: LabelOptions, source: Any) -> Mixing:
    """Mixup, CutMix and label smoothing of labelled images or clips."""
    return Mixing(
        num_classes=len(source.label_names),
        mixup=config.mixup,
        cutmix=config.cutmix,
        prob=config.mix_prob,
        switch_prob=config.switch_prob,
        label_smoothing=config.smoothing,
        separate=config.separate_mix,
        seed=config.seed,
    )


class LabelObjective(Objective):
    """Cross-entropy with mixed and smoothed labels."""

    def __init__(self, options: LabelOptions, source: Any) -> None:
        self.mixing = mixing(options, source)

    def mix(
        self, views: list[Tensor], targets: list[Tensor], epoch: int, step: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        return self.mixing(views, targets[0], epoch, step)

    def __call__(self, outputs: Outputs, target: Tensor, view: Tensor) -> Tensor:
        return soft_cross_entropy(outputs["logits"], target)
