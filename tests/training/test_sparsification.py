"""DynamicViT's losses by hand, and a short run from an unpruned host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from anyres.errors import UserError
from anyres.tasks import load_pretrained
from anyres.tasks.classification.sparsification import ratio_loss, token_distillation
from anyres.training import train
from tests.training.helpers import small_config

TINY: dict[str, Any] = {
    "model": "dynamicvit_deit_256",
    "model_args": {"embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 4, "prune_before": [1, 2, 3]},
    "sizes": [16],
    "distillation": "none",
    "eval_every": 9,
}


def test_the_ratio_loss_is_of_every_image() -> None:
    decisions = torch.tensor([[[1.0, 1, 1, 1]], [[0, 0, 0, 0]]])
    assert float(ratio_loss(decisions, [0.5])) == 0.25


def test_token_distillation_looks_at_the_patches_kept_last() -> None:
    tokens, decisions = torch.tensor([[[1.0, 1.0], [9.0, 9.0]]]), torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    teacher = {"tokens": torch.zeros(1, 2, 2)}
    assert float(token_distillation({"tokens": tokens, "decisions": decisions}, teacher)) == 1
    assert float(token_distillation({"tokens": tokens, "decisions": 0 * decisions}, teacher)) == 0


def test_a_run_learns_from_its_unpruned_host(tmp_path: Path) -> None:
    host = {**TINY, "model_args": {**TINY["model_args"], "prune_before": []}}
    train(small_config(tmp_path / "host", **host))
    result = train(small_config(tmp_path / "run", **TINY, sparsify=2.0, init_from=str(tmp_path / "host")))
    assert result.status == "finished"
    model = load_pretrained(tmp_path / "run" / "last")
    assert model.keep_ratios == pytest.approx((0.7, 0.49, 0.343))
    assert model.predictors[0].fc3.bias.any()  # it starts at zero


def test_what_sparsification_needs(tmp_path: Path) -> None:
    for changes, sentence in (
        ({"sparsify": 2.0}, "set init_from"),
        ({"sparsify": 2.0, "teacher": "regnety_160"}, "leave teacher out"),
        ({"sparsify": 2.0, "init_from": "x", "model": "resformer_tiny", "model_args": {}}, "score predictors"),
    ):
        with pytest.raises(UserError, match=sentence):
            train(small_config(tmp_path / "run", **{**TINY, **changes}))
