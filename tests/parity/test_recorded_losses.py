"""The recorded training losses, model included: ResFormer's chain over three sizes and DeiT's distillation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from anyres.models._checkpoints import load_checkpoint
from anyres.models._plain import Plain
from anyres.models._registry import create_model
from anyres.tasks.losses import distilled_loss, soft_cross_entropy
from anyres.training.losses import backward_replicas
from tests.parity.reference import Case, cases, image
from tests.typed import as_a

TOLERANCE = 1e-5
LOSS_CASES = [case for case in cases() if "losses" in case.record["outputs"]]
ONE_HOT = torch.nn.functional.one_hot(torch.tensor([7]), 1000).float()


def by_system(system: str) -> list[Case]:
    return [case for case in LOSS_CASES if case.about["system"] == system]


def loaded(case: Case, name: str, tmp_path: Path) -> Plain:
    torch.save({"model": case.weights()}, tmp_path / "published.pth")
    model = as_a(Plain, create_model(name))
    load_checkpoint(model, tmp_path / "published.pth")
    return model.train()


def test_there_are_cases() -> None:
    assert len(by_system("resformer")) == 3
    assert len(by_system("deit")) == 1


@pytest.mark.parametrize("case", by_system("resformer"), ids=lambda case: case.about["variant"])
def test_the_chain_over_three_sizes(case: Case, tmp_path: Path) -> None:
    config = case.about["config"]
    sizes, target = config["input_sizes"], config["distillation_target"]
    model = loaded(case, "resformer_tiny", tmp_path)
    views = [case.input(), *(image([1, 3, size, size], 1000 + size) for size in sizes[1:])]
    vectors = {}

    def forward(view: torch.Tensor, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
        out = model.forward_train(view, wanted or (target,))
        vectors[view.shape[-1]] = out["logits" if target == "logit" else target]
        return out

    losses = backward_replicas(
        forward,
        views,
        [ONE_HOT] * len(views),
        lambda out, labels, _: soft_cross_entropy(out["logits"], labels),
        kind=config["distillation_type"],
        target=target,
        alpha=config["distillation_alpha"],
        backward=lambda loss: None,
    )
    for size in sizes:
        assert case.error(f"target{size}", vectors[size]) <= TOLERANCE
    assert case.error("losses", torch.stack([*losses, torch.stack(losses).mean()])) <= TOLERANCE


@pytest.mark.parametrize("case", by_system("deit"), ids=lambda case: case.about["variant"])
def test_distillation_from_a_teacher(case: Case, tmp_path: Path) -> None:
    config = case.about["config"]
    model = loaded(case, "deit_tiny_distilled", tmp_path)
    out = model.forward_train(case.input())
    assert case.error("logits", out["logits"]) <= TOLERANCE
    assert case.error("dist_logits", out["dist_logits"]) <= TOLERANCE
    teacher = torch.from_numpy(2 * np.random.RandomState(77).standard_normal((1, 1000)).astype(np.float32))
    base = soft_cross_entropy(out["logits"], ONE_HOT)
    options = {"alpha": config["alpha"], "tau": config["tau"]}
    soft, hard = (distilled_loss(base, out["dist_logits"], teacher, kind, **options) for kind in ("soft", "hard"))
    assert case.error("losses", torch.stack([base, soft, hard])) <= TOLERANCE
