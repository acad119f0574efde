"""DynamicViT's recorded training passes: decisions under given Gumbel noise, features, and every loss term."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from anyres.layers import sparsify
from anyres.models._checkpoints import load_checkpoint
from anyres.models._registry import create_model
from anyres.models.dynamic_spatial import DynamicPyramid
from anyres.models.dynamicvit import DynamicViT
from anyres.tasks.classification.sparsification import sparsification_losses
from anyres.tasks.losses import soft_cross_entropy
from tests.parity.reference import Case, cases

TOLERANCE = 1e-5
HOSTS = {"deit-256": "deit_256", "lvvit-s": "lvvit_small", "convnext-t": "convnext_tiny", "swin-t": "swin_tiny"}
LOSS_CASES = [c for c in cases() if c.about["system"] == "dynamicvit" and "losses" in c.record["outputs"]]
ONE_HOT = torch.nn.functional.one_hot(torch.tensor([7]), 1000).float()


def recorded_noise(channels_first: bool) -> Callable[[Tensor], Tensor]:
    """The noise of predictor call i is RandomState(500 + i)'s, in the layout of the published log-probabilities."""
    calls = count()

    def noise(like: Tensor) -> Tensor:
        stream = np.random.RandomState(500 + next(calls))
        if not channels_first:
            return torch.from_numpy(stream.gumbel(size=tuple(like.shape)).astype(np.float32))
        B, N, _ = like.shape
        return torch.from_numpy(stream.gumbel(size=(B, 2, N)).astype(np.float32)).transpose(1, 2)

    return noise


def test_there_are_cases() -> None:
    assert len(LOSS_CASES) == len(HOSTS)


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.about["variant"])
def test_a_training_pass(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, config = case.about["variant"].partition("_")[0], case.about["config"]
    monkeypatch.setattr(sparsify, "gumbel_noise", recorded_noise(host.startswith("convnext")))
    torch.save({"model": case.weights()}, tmp_path / "published.pth")
    name = f"dynamicvit_{HOSTS[host]}"
    student, teacher = create_model(name), create_model(name, prune_before=())
    assert isinstance(student, DynamicViT | DynamicPyramid)
    assert isinstance(teacher, DynamicViT | DynamicPyramid)
    assert load_checkpoint(student, tmp_path / "published.pth").complete
    assert not load_checkpoint(teacher, tmp_path / "published.pth", strict=False).missing
    student.train()
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    x = case.input()
    with torch.no_grad():
        out, target = student.forward_train(x), teacher.eval().forward_train(x)
    features = next(out[name] for name in ("map", "aux_logits", "tokens") if name in out)
    losses = sparsification_losses(
        soft_cross_entropy(out["logits"], ONE_HOT),
        out,
        target,
        student.keep_ratios,
        config["ratio_weight"],
        config["distill_weight"],
    )
    ours = {
        "logits": out["logits"],
        "features": features.flatten(1, 2) if host.startswith("swin") else features,
        "mask": out["decisions"][:, -1],
        "losses": losses,
        **{f"decision{i + 1}": out["decisions"][:, i] for i in range(3)},
    }
    errors = {name: case.error(name, ours[name]) for name in case.record["outputs"]}
    assert max(errors.values()) <= TOLERANCE, errors
