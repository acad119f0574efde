"""Every registered model against the numbers recorded from its published code, through the ordinary loading path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anyres.backbone import Backbone
from anyres.checkpoints import load_checkpoint
from anyres.registry import create_model, entries
from tests.parity.reference import Case, cases

TOLERANCE = 1e-5
LOSSES = "losses"
CASES = [case for case in cases() if LOSSES not in case.record["outputs"]]


def build(case: Case) -> Backbone:
    """The model of a case, with the options that make awkward sizes behave as the published code does."""
    height, width = case.record["input"][-2:]
    variant = case.about["variant"]
    name = next(key for key, entry in entries().items() if variant.startswith(entry.variant.published))
    patch = case.about["config"].get("patch_size", 1)
    truncate = {"remainder": "truncate"} if height % patch or width % patch else {}
    return create_model(name, **truncate).eval()


OUTPUTS: dict[str, Callable[[Backbone, Tensor], Tensor]] = {
    "logits": lambda model, x: model(x),
    "tokens": lambda model, x: model.forward_features(x),
    "embedded": lambda model, x: model.embed(x)[0],
    "block0": lambda model, x: block0(model, x),
    "dist_logits": lambda model, x: model.forward_train(x)["dist_logits"],
}


def block0(model: Backbone, x: Tensor) -> Tensor:
    (features, prefix) = model.forward_intermediates(
        x, [0], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )[0]
    return torch.cat((prefix, features), dim=1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.manifest.stem}-{case.tag}")
@torch.inference_mode()
def test_outputs_equal_the_recorded_ones(case: Case, tmp_path) -> None:
    model = build(case)
    path = tmp_path / "published.pth"
    torch.save({"model": case.weights()}, path)
    report = load_checkpoint(model, path)
    assert report.complete
    assert sum(p.numel() for p in model.parameters()) == case.about["parameters"]
    x = case.input()
    errors = {name: case.error(name, OUTPUTS[name](model, x)) for name in case.record["outputs"]}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.manifest.stem}-{case.tag}")
def test_keys_go_back_to_the_published_ones(case: Case) -> None:
    model = build(case)
    published = case.weights()
    ours = type(model).from_published(published)
    assert ours.keys() == model.state_dict().keys()
    assert type(model).to_published(ours).keys() == published.keys()


def test_every_model_family_has_recorded_cases() -> None:
    recorded = {case.about["variant"] for case in cases()}
    for name, (family, _) in entries().items():
        published = [variant.published for variant in family.variants.values()]
        assert any(variant.startswith(tuple(published)) for variant in recorded), name
