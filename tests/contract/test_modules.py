"""A module is what it seems: whoever listens to it, wraps it, replaces it or trains it meets it in every computation.

Hooks, LoRA, quantisation and visualisation all rest on two things, which are tried here on every registered model: a
submodule is called, with no way around it, and what a module has returned is never written to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from anyres.backbone import Backbone
from tests.contract.small import distinct_models, image, small

pytestmark = pytest.mark.parametrize("name", distinct_models())

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((ours - expected).norm() <= tolerance * expected.norm())


class Records:
    """What every submodule returned: the tensors themselves, copies made at once, and their versions."""

    def __init__(self, model: nn.Module) -> None:
        self.kept: dict[str, list[Tensor]] = {}
        self.copies: dict[str, list[Tensor]] = {}
        self.versions: list[tuple[str, Tensor, int]] = []
        self.handles = [
            module.register_forward_hook(lambda _, __, out, name=name: self.record(name, out))
            for name, module in model.named_modules()
        ]

    def record(self, name: str, out: Any) -> None:
        for tensor in (leaf for leaf in tree_leaves(out) if torch.is_tensor(leaf)):
            self.kept.setdefault(name, []).append(tensor)
            self.copies.setdefault(name, []).append(tensor.detach().clone())
            if not tensor.is_inference():
                self.versions.append((name, tensor, tensor._version))

    def check_untouched(self) -> None:
        for name, tensor, version in self.versions:
            assert tensor._version == version, f"what {name} returned was written to"
        for name, tensors in self.kept.items():
            for tensor, copy in zip(tensors, self.copies[name], strict=True):
                assert torch.equal(tensor, copy), f"what {name} returned was written to"

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("dense", [False, True])
def test_hooks_see_the_same_with_and_without_gradients(name: str, dense: bool) -> None:
    model = small(name, **({"dense": True} if dense else {}))
    x = image(2, (64, 80), model)
    seen = {}
    for mode, context in MODES.items():
        with context():
            records = Records(model)
            model(x)
            records.check_untouched()
            records.remove()
            seen[mode] = records.copies
    own = {key for key, module in model.named_modules() if list(module.parameters(recurse=False))}
    silent = own - seen["grad"].keys()
    assert not [key for key in silent if not any(part in key for part in model.unused)]
    for mode in ("no_grad", "inference_mode"):
        assert seen[mode].keys() == seen["grad"].keys()
        for key, tensors in seen[mode].items():
            for ours, expected in zip(tensors, seen["grad"][key], strict=True):
                assert close(ours.double(), expected.double()), key


def test_training_writes_to_no_output(name: str) -> None:
    model = small(name, drop_path_rate=0.2).train()
    records = Records(model)
    model.forward_train(image(2, (64, 80), model), ("cls", "gap"))["logits"].sum().backward()
    records.check_untouched()
    records.remove()


def seal(model: Backbone) -> dict[str, int]:
    """Make every linear layer and convolution refuse to show its parameters to anybody but itself, and count its
    calls."""
    calls: dict[str, int] = {}

    def sealed(kind: type[nn.Module], name: str) -> type[nn.Module]:
        def own(key: str) -> property:
            def read(self: Any) -> Any:
                assert self.open, f"{name}.{key} is read from outside"
                return self._parameters[key]

            return property(read)

        def forward(self: Any, *args: Any) -> Any:
            calls[name] += 1
            self.open = True
            try:
                return kind.forward(self, *args)
            finally:
                self.open = False

        return type(kind.__name__, (kind,), {"forward": forward, "weight": own("weight"), "bias": own("bias")})

    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            calls[name] = 0
            module.__class__ = sealed(type(module), name)
    return calls


@pytest.mark.parametrize("dense", [False, True])
def test_every_layer_is_called_and_no_weight_is_read_around_it(name: str, dense: bool) -> None:
    model = small(name, **({"dense": True} if dense else {}))
    x = image(2, (64, 80), model)
    calls = seal(model)
    whole = [
        lambda: model(x),
        lambda: model.forward_intermediates(x),
        lambda: model.train().forward_train(x, ("cls", "gap")),
    ]
    with torch.no_grad():
        for run in whole[:1] if dense else whole:
            calls.update(dict.fromkeys(calls, 0))
            run()
            heads = () if run is not whole[1] else ("head", "aux_head", "neck", "hidden")
            assert [key for key, count in calls.items() if count == 0 and not key.startswith(heads)] == []
