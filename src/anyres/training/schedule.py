"""Learning rate over a run: linear warm-up, then half a cosine down to a floor."""

from __future__ import annotations

import math


def learning_rate(
    epoch: float,
    *,
    peak: float,
    epochs: int,
    warmup_epochs: float = 0.0,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
) -> float:
    """ResFormer's schedule at a fractional epoch (epochs done + part of the current one), changed at every step.

    Warm-up runs from `warmup_lr` to `peak`; the cosine spans what is left, `epochs - warmup_epochs`.
    """
    if epoch < warmup_epochs:
        return warmup_lr + (peak - warmup_lr) * epoch / warmup_epochs
    progress = min((epoch - warmup_epochs) / (epochs - warmup_epochs), 1.0)
    return min_lr + (peak - min_lr) * (1 + math.cos(math.pi * progress)) / 2


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
