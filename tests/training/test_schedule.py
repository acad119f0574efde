"""Learning rates against hand-computed values and timm's scheduler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from anyres.training.schedule import learning_rate, learning_rate_by_epoch


def test_resformer_schedule_at_its_landmarks() -> None:
    shape: dict[str, Any] = {"peak": 1e-3, "epochs": 300, "warmup_epochs": 5, "min_lr": 1e-5}
    assert learning_rate(0.0, **shape) == 0
    assert learning_rate(2.5, **shape) == pytest.approx(5e-4)
    assert learning_rate(5.0, **shape) == pytest.approx(1e-3)
    assert learning_rate(152.5, **shape) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(300.0, **shape) == pytest.approx(1e-5)
    third = 5 + 295 / 3
    assert learning_rate(third, **shape) == pytest.approx(1e-5 + (1e-3 - 1e-5) * 0.75)
    assert learning_rate(1.0, **shape, warmup_lr=1e-4) == pytest.approx(1e-4 + 9e-4 / 5)


def test_deit_schedule_is_timms_one_epoch_late() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = CosineLRScheduler(optimizer, t_initial=30, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    rates = []
    for epoch in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    for epoch, rate in enumerate(rates):
        ours = learning_rate_by_epoch(epoch, peak=1e-3, epochs=30, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5)
        assert math.isclose(ours, rate, rel_tol=1e-9), epoch


def test_no_warmup_and_constant_rate() -> None:
    assert learning_rate(0.0, peak=1.0, epochs=2) == 1
    rates = {learning_rate_by_epoch(epoch, peak=5e-6, epochs=30, min_lr=5e-6) for epoch in range(30)}
    assert rates == {5e-6}


def test_other_falls_after_the_same_warmup() -> None:
    shape: dict[str, Any] = {"peak": 1.0, "epochs": 11, "warmup_epochs": 1, "min_lr": 0.1}
    assert learning_rate(0.5, **shape, decay="linear") == 0.5
    assert learning_rate(6.0, **shape, decay="linear") == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(6.0, **shape, decay="poly") == pytest.approx(0.1 + 0.9 * 0.5**0.9)
    rates = [learning_rate(epoch, **shape, decay="step", drops=[8, 10]) for epoch in (7.9, 8.0, 9.9, 10.5)]
    assert rates == pytest.approx([1, 0.1, 0.1, 0.01])
