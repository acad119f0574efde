"""Learning rate over a run: linear warm-up, then half a cosine (or a line, a power, steps) down to a floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from anyres.training.config import RunConfig


def rate_at(config: RunConfig, epoch: int, part: float) -> float:
    """The rate of a step of a run, `part` (0 to 1) of an epoch after `epoch` whole ones."""
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
    """The rate at a fractional epoch (epochs done + part of the current one), changed at every step.

    Warm-up runs from `warmup_lr` to `peak`. `decay` "cosine" (ResFormer), "linear" and "poly" (power 0.9; both of
    segmentation) span what is left, `epochs - warmup_epochs`; "step" is a tenth after each of `drops` (detection).
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
    """DeiT's schedule in whole epochs: the rate of epoch e is the scheduler's value at max(e - 1, 0).

    The published script steps the scheduler at the end of an epoch with that epoch's number, so every rate comes one
    epoch late. The cosine spans all `epochs`, the warm-up included, and is cut into by it.
    """
    done = max(epoch - 1, 0)
    if done < warmup_epochs:
        return warmup_lr + (peak - warmup_lr) * done / warmup_epochs
    return min_lr + (peak - min_lr) * (1 + math.cos(math.pi * min(done / epochs, 1.0))) / 2
