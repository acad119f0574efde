"""A module is what it seems: whoever listens to it, wraps it, replaces it or trains it meets it in every computation.

Hooks, LoRA, quantisation and visualisation all rest on two things, which are tried here on every registered model: a
submodule is called, with no way around it, and what a module has returned is never written to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from anyres.models._backbone import Backbone
from tests.contract.small import distinct_models, image, small
from tests.contract.watching import LAYERS, Records, seal
from tests.systems import system
from tests.typed import as_a

pytestmark = pytest.mark.parametrize("name", distinct_models())

MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((ours - expected).norm() <= tolerance * expected.norm())


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


def test_lora_on_every_layer_equals_the_merged_network(name: str) -> None:
    """Forward and backward in training mode, in float64, where a ReLU does not change sides between the two."""
    peft = pytest.importorskip("peft")
    model = small(name).double().train()
    x = image(2, (64, 80), model).double()
    targets = [key for key, layer in model.named_modules() if isinstance(layer, LAYERS) and grouped(layer) == 1]
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(config, model)
    layers = [layer for layer in adapted.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    assert len(layers) == len(targets)

    def step() -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)  # DynamicViT draws what it drops
        pixels = x.clone().requires_grad_()
        out = adapted.forward_train(pixels, ("cls", "gap"))
        loss = sum((value * torch.randn_like(value)).sum() for value in out.values())
        loss.backward()
        return out["logits"].detach(), as_a(Tensor, pixels.grad)

    logits, gradient = step()
    without = [key for key, p in adapted.named_parameters() if "lora_" in key and (p.grad is None or not p.grad.any())]
    assert not without
    for layer in layers:
        layer.merge()
    merged_logits, merged_gradient = step()
    assert close(logits, merged_logits, 1e-9)
    assert close(gradient, merged_gradient, 1e-9)


def grouped(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


class Int8Linear(nn.Module):
    """A linear layer that is none: what quantisation puts in its place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = layer.weight.abs().amax(1, keepdim=True) / 127
        self.weight = (layer.weight / self.scale).round().to(torch.int8)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@torch.no_grad()
def test_linear_layers_may_be_int8(name: str) -> None:
    model = small(name)
    x = image(2, (64, 80), model)
    expected = model(x)
    for key, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(key, Int8Linear(layer))
    assert close(model(x), expected, 0.3)  # about 0.01, but for a DynamicViT that drops other tokens


@pytest.mark.parametrize("dense", [False, True])
def test_feature_info_names_modules_that_return_the_maps(name: str, dense: bool) -> None:
    """One tensor each, batch first, in the layout that `output_fmt` says, on the way to the result: enough for a
    class-activation map."""
    model = small(name, **({"dense": True} if dense else {}))
    x = image(2, (64, 96), model)
    seen: dict[str, Tensor] = {}
    names = [info["module"] for info in model.feature_info]
    for key in names:
        model.get_submodule(key).register_forward_hook(lambda _, __, out, key=key: seen.update({key: out}))
    maps = model.forward_intermediates(x, intermediates_only=True)
    for key, map_ in zip(names, maps, strict=True):
        if not dropped(model, seen[key], map_):
            assert torch.equal(as_nchw(seen[key], model.output_fmt, map_.shape[2:]), map_), key
    result = sum(map_.square().sum() for map_ in model(x)) if dense else model(x).square().sum()
    gradients = torch.autograd.grad(result, [seen[key] for key in names], allow_unused=True)
    unread = [key for key, gradient in zip(names, gradients, strict=True) if gradient is None]
    assert unread == ([] if dense else getattr(system(name), "UNREAD_MAPS", []))


@torch.inference_mode()
def test_every_feature_class_of_timm(name: str) -> None:
    whole = small(name)
    args = {key: value for key, value in whole.model_args.items() if key != "num_classes"}
    x = image(2, (64, 96), whole)
    levels = range(len(whole.feature_info))[-2:]
    expected = whole.forward_intermediates(x, list(levels), intermediates_only=True)
    for kind in ("getter", "list", "dict", "hook"):
        net: Any = timm.create_model(
            f"anyres_{name}", features_only=True, feature_cls=kind, out_indices=[*levels], **args
        )
        (net.body if kind == "hook" else net.model).load_state_dict(whole.state_dict(), strict=False)
        maps = net.eval()(x)
        if kind == "dict":
            assert list(maps) == [str(level) for level in levels]
            maps = maps.values()
        assert net.output_fmt == (whole.output_fmt if kind == "hook" else "NCHW")
        for ours, map_, width in zip(maps, expected, net.feature_info.channels(), strict=True):
            if kind != "hook" or not dropped(whole, ours, map_):
                ours = as_nchw(ours, net.output_fmt, map_.shape[2:])
                assert close(ours, map_)
                assert ours.shape[1] == width
    with pytest.raises(ValueError, match=r'"fx".*"getter"'):
        timm.create_model(f"anyres_{name}", features_only=True, feature_cls="fx", **args)


def as_nchw(out: Tensor, layout: str, size: tuple[int, ...]) -> Tensor:
    """What a module of `feature_info` returns, as the map of this size that it holds."""
    if layout == "NLC":  # the map's tokens stand behind the prefix
        return out[:, out.shape[1] - math.prod(size) :].mT.unflatten(2, size)
    return out.movedim(-1, 1) if layout == "NHWC" else out


def dropped(model: Backbone, out: Tensor, map_: Tensor) -> bool:
    """Whether these tokens are what a DynamicViT has left of the map."""
    return model.output_fmt == "NLC" and out.shape[1] < math.prod(map_.shape[2:])
