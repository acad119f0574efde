"""Every registered model against the numbers recorded from its published code, through the ordinary loading path."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyres.models._backbone import Backbone
from anyres.models._checkpoints import load_checkpoint
from anyres.models._registry import create_model, entries
from tests.parity.reference import Case, cases
from tests.systems import system
from tests.typed import as_a

TOLERANCE = {"mpvit": 1e-4}
"""MPViT's activations grow with these weights; 1e-5 for every other system."""
SYSTEM_FILES = {"dynamicvit": ("dynamicvit", "dynamic_spatial")}
"""The model files of a recorded system, where it has more than one of its own name."""
LOSSES = "losses"
CASES = [case for case in cases() if LOSSES not in case.record["outputs"]]  # those are in test_recorded_losses.py


def registered(case: Case) -> str:
    """The registered name of a case: the longest published name, or else registered name, that its variant starts with,
    within its system; for a small network that was never published the system's first name."""
    about = case.about
    names = {
        entry.variant.published: name
        for name, entry in entries().items()
        if entry.family.model.__module__.rpartition(".")[2] in SYSTEM_FILES.get(about["system"], (about["system"],))
    }
    fitting = [published for published in names if about["variant"].startswith(published)]
    fitting = fitting or [published for published in names if about["variant"].startswith(names[published])]
    return names[max(fitting, key=len)] if fitting else next(iter(names.values()), "")


def build(case: Case) -> Backbone:
    """The model of a case, with the options that its manifest asks for."""
    name = registered(case)
    chosen: dict[str, Any] = getattr(system(name), "options", lambda about, record: {})(case.about, case.record)
    return as_a(Backbone, create_model(chosen.pop("name", name), **chosen)).eval()


def outputs(case: Case) -> dict[str, Callable[[Any, Tensor], Tensor]]:
    """How to get each output of a case from the model and the input."""
    return {**OUTPUTS, **getattr(system(registered(case)), "OUTPUTS", {})}


def stage(index: int) -> Callable[[Any, Tensor], Tensor]:
    return lambda model, x: model.forward_intermediates(x, intermediates_only=True)[index]


OUTPUTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "logits": lambda model, x: model(x),
    "tokens": lambda model, x: model.forward_features(x),
    "embedded": lambda model, x: model.embed(x)[0],
    "block0": lambda model, x: block0(model, x),
    "dist_logits": lambda model, x: model.forward_train(x)["dist_logits"],
    **{f"stage{i + 1}": stage(i) for i in range(4)},
}


def block0(model: Any, x: Tensor) -> Tensor:
    (features, prefix) = model.forward_intermediates(
        x, [0], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )[0]
    return torch.cat((prefix, features), dim=1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.manifest.stem}-{case.tag}")
@torch.inference_mode()
def test_outputs_equal_the_recorded_ones(case: Case, tmp_path: Path) -> None:
    model = build(case)
    path = tmp_path / "published.pth"
    torch.save({"model": case.weights()}, path)
    report = load_checkpoint(model, path)
    assert report.complete
    # A table that loading resized is counted as it was stored.
    stored = type(model).from_published(case.weights())
    counts = {name: (stored[name] if name in report.resized else p).numel() for name, p in model.named_parameters()}
    assert sum(counts.values()) == case.about["parameters"]
    x = case.input()
    tolerance = TOLERANCE.get(case.about["system"], 1e-5)
    found = {name: outputs(case)[name](model, x) for name in case.record["outputs"]}
    for name, output in found.items():
        if case.error(name, output) <= tolerance:
            continue
        # The record was rounded, too, and how the two add up depends on the processor's kernels (DAT++ dense, AVX-512:
        # 1.3e-5 between them). Then neither may be farther from the exact numbers than the tolerance (4.5e-6, 4.0e-6).
        exact = outputs(case)[name](deepcopy(model).double(), x.double())
        assert case.error(name, exact.float()) <= tolerance, f"{name}: the record from float64"
        assert (output - exact).norm() <= tolerance * exact.norm(), f"{name}: float32 from float64"


FIRST_TAGS = [
    case for case in CASES if case.record is case.about["cases"][0] or case.tag == case.about["cases"][0]["tag"]
]


@pytest.mark.parametrize("case", FIRST_TAGS, ids=lambda case: case.manifest.stem)
def test_keys_go_back_to_the_published_ones(case: Case) -> None:
    """Both ways without loss; second names come back as copies; a file with index tables and second names loads."""
    model = build(case)
    published = case.weights()
    ours = type(model).from_published(published)
    assert {name for name in model.state_dict() if not name.endswith("num_batches_tracked")} == ours.keys()
    again = type(model).to_published(ours)
    roles = {name: role for name, _, role in case.about["state_dict"]}
    assert again.keys() - published.keys() == {name for name, role in roles.items() if role == "alias"}
    assert all(torch.equal(again[name], tensor) for name, tensor in published.items())
    everything = {name: again.get(name, torch.zeros(1)) for name in roles if not name.endswith("num_batches_tracked")}
    assert type(model).from_published(everything).keys() == ours.keys()
    assert type(model).from_published(ours).keys() == ours.keys()


def test_every_model_family_has_recorded_cases() -> None:
    recorded = {registered(case) for case in cases()}
    families = {id(entry.family) for name, entry in entries().items() if name in recorded}
    assert all(id(entry.family) in families for entry in entries().values())
