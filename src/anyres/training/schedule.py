"""Learning-rate schedules: linear warm-up, then cosine, linear, polynomial or step decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from anyres.training.config import RunConfig


def rate_at(config: RunConfig, epoch: int, part: float) -> float:
    """Return the learning rate of a run after `epoch` whole epochs and a fraction `part` (0 to 1) of the next one."""
    shape: dict[str, Any] = {"peak": config.peak_lr, "epochs": config.epochs, "min_lr": config.min_lr}
    shape |= {"warmup_epochs": config.warmup_epochs, "warmup_lr": config.warmup_lr}
    if config.schedule == "epoch":
        return learning_rate_by_epoch(epoch, **shape)
    return learning_rate(epoch + part, decay=config.decay, drops=config.drops, **shape)


def learning_rate(
    epoch: float,
    *,
    peak: float,
    epochs: int,
    warmup_epochs: float = 0.0,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
    decay: str = "cosine",
    drops: Sequence[float] = (),
) -> float:
    """Return the learning rate at a fractional epoch (finished epochs + fraction of the current one).

    Warm-up rises linearly from `warmup_lr` to `peak`. The decays "cosine" (ResFormer), "linear" and "poly" (power 0.9;
    both used in segmentation) span the remaining `epochs - warmup_epochs` and end at `min_lr`. The decay "step", used
    in detection, divides the rate by 10 after each of the epochs in `drops`.
    """
    if epoch < warmup_epochs:
        return warmup_lr + (peak - warmup_lr) * epoch / warmup_epochs
    if decay == "step":
        return peak * 0.1 ** sum(epoch >= drop for drop in drops)
    progress = min((epoch - warmup_epochs) / (epochs - warmup_epochs), 1.0)
    falls = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "poly": (1 - progress) ** 0.9}
    return min_lr + (peak - min_lr) * falls[decay]


def learning_rate_by_epoch(
    epoch: int,
    *,
    peak: float,
    epochs: int,
    warmup_epochs: float = 0.0,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
) -> float:
    """Return the learning rate of a whole epoch in DeiT's schedule: the scheduler's value at max(epoch - 1, 0).

    The published script steps the scheduler at the end of each epoch with the number of that epoch, so every rate
    comes one epoch late. The cosine spans all `epochs`; warm-up replaces its first part.
    """
    done = max(epoch - 1, 0)
    if done < warmup_epochs:
        return warmup_lr + (peak - warmup_lr) * done / warmup_epochs
    return min_lr + (peak - min_lr) * (1 + math.cos(math.pi * min(done / epochs, 1.0))) / 2
