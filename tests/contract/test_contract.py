"""What every registered model promises, at awkward sizes. A new model is covered by being registered."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from torch import Tensor

from anyres.models._registry import create_model, entries
from anyres.tasks import load_pretrained
from tests.contract.small import SIZES, distinct_models, image, small
from tests.systems import system
from tests.typed import as_a

pytestmark = pytest.mark.parametrize("name", distinct_models())
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((ours - expected).norm() <= tolerance * expected.norm())


@sizes
@torch.inference_mode()
def test_maps_have_the_predicted_sizes_and_batches_do_not_mix(name: str, size: tuple[int, int] | None) -> None:
    model = small(name)
    x = image(3, size, model)
    height, width = x.shape[-2:]
    logits = model(x)
    assert logits.shape == (3, 7)
    assert logits.isfinite().all()
    assert close(logits, torch.cat([model(one[None]) for one in x]), 2e-6)
    assert close(model.forward_head(model.forward_features(x)), logits, 2e-6)

    features, maps = model.forward_intermediates(x)
    assert close(features, model.forward_features(x), 2e-6)
    predicted = model.feature_sizes(height, width)
    assert len(maps) == len(predicted) == len(model.feature_info)
    for map_, info, (h, w) in zip(maps, model.feature_info, predicted, strict=True):
        assert (*map_.shape[:2], *map_.shape[-2:]) == (3, info["num_chs"], h, w)  # clips: time in between
        floors = getattr(system(name), "FLOORS", False)  # published arithmetic that a recorded case shows
        allowed = (0, 1) if floors else (0,)
        assert math.ceil(height / info["reduction"]) - h in allowed
        assert math.ceil(width / info["reduction"]) - w in allowed


@torch.inference_mode()
def test_the_order_of_sizes_leaves_no_trace(name: str) -> None:
    veteran = small(name)
    before = {key: value.clone() for key, value in veteran.state_dict().items()}
    attributes = {key for module in veteran.modules() for key in vars(module)}
    inputs = [image(1, size, veteran, seed) for seed, size in enumerate(SIZES[:5])]
    for x in inputs:
        veteran(x)
    for x in reversed(inputs):
        assert torch.equal(veteran(x), small(name)(x))
    after = veteran.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert attributes == {key for module in veteran.modules() for key in vars(module)}


def test_too_small_is_one_sentence(name: str) -> None:
    model = small(name)
    side = model.minimum_size - 1
    with pytest.raises(ValueError, match=rf"{side}x50.*at least {model.minimum_size}.*{model.minimum_size}x50"):
        model(image(1, (side, 50), model))
    with pytest.raises(ValueError, match="in_chans"):
        model(torch.zeros(1, 2, 64, 64))


def gradients(name: str, checkpointing: bool) -> dict[str, Tensor | None]:
    model = small(name).train()
    model.set_grad_checkpointing(checkpointing)
    out = model.forward_train(image(2, (97, 131), model), ("cls", "gap"))
    # Fixed random weights, so that a norm's mean-free output does not cancel a gradient.
    noise = (torch.randn(value.shape, generator=torch.Generator().manual_seed(5)) for value in out.values())
    torch.stack([(value * weights).sum() for value, weights in zip(out.values(), noise, strict=True)]).sum().backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}


def test_gradients_reach_every_parameter_and_checkpointing_keeps_them(name: str) -> None:
    plain, checkpointed = gradients(name, False), gradients(name, True)
    for key, gradient in plain.items():
        assert gradient is not None, key
        assert gradient.any(), key
        again = checkpointed[key]
        assert again is not None, key
        assert close(again, gradient, 1e-5), key


def test_logits_alone_leave_no_parameter_without_gradient(name: str) -> None:
    """Distributed training waits for every parameter's gradient, also where the head reads only a prefix token."""
    model = small(name).train()
    model.forward_train(image(1, (64, 80), model))["logits"].sum().backward()
    without = [key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not without or without == ["head_dist.weight", "head_dist.bias"]


def test_checkpointing_and_drop_path_draw_alike(name: str) -> None:
    def step(checkpointing: bool) -> Tensor:
        model = small(name, drop_path_rate=0.5).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        model(image(4, (64, 64), model)).square().sum().backward()
        return torch.cat([as_a(Tensor, p.grad).flatten() for p in model.parameters() if p.requires_grad])

    assert close(step(True), step(False), 1e-5)


@torch.inference_mode()
def test_bfloat16_autocast(name: str) -> None:
    model = small(name)
    x = image(2, (97, 131), model)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = model(x)
    assert ours.isfinite().all()
    assert close(ours.float(), expected, 0.05)


def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = small(name, in_chans=1)
    model.pretrained_cfg["label_names"] = list("abcdefg")
    model.pretrained_cfg["train_sizes"] = [[32, 32], [24, 24]]
    model.save_pretrained(tmp_path / "model")
    x = image(2, (50, 200), model)
    loaded = load_pretrained(tmp_path / "model")
    assert torch.equal(loaded(x), model(x))
    assert loaded.pretrained_cfg["label_names"] == list("abcdefg")
    assert loaded.pretrained_cfg["train_sizes"] == [[32, 32], [24, 24]]
    again = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(again(x), model(x))
    if Version(timm.__version__) >= Version("1.0.31"):  # 1.0.20 looks for a torch file there; in between was not tried
        through_timm = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
        assert torch.equal(through_timm(x), model(x))


@torch.inference_mode()
def test_timm_feature_extraction(name: str) -> None:
    whole = small(name)
    levels = type(whole).default_out_indices({**entries()[name].variant.args, **whole.model_args})
    torch.manual_seed(0)
    net: Any = timm.create_model(
        f"anyres_{name}", features_only=True, **{k: v for k, v in whole.model_args.items() if k != "num_classes"}
    )
    net.model.load_state_dict(whole.state_dict(), strict=False)
    x = image(1, (97, 131), whole)
    expected = whole.forward_intermediates(x, levels, intermediates_only=True)
    maps = net.eval()(x)
    assert [m.shape for m in maps] == [m.shape for m in expected]
    assert all(close(ours, m) for ours, m in zip(maps, expected, strict=True))
    assert net.feature_info.channels() == [m.shape[1] for m in maps]
    reductions = net.feature_info.reduction()
    assert reductions == sorted(reductions)


def test_head_can_be_replaced(name: str) -> None:
    model = small(name)
    x = image(2, (64, 64), model)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(4, "avg")
    assert model.global_pool == "avg"
    assert model(x).shape == (2, 4)


def test_parameter_groups(name: str) -> None:
    model = small(name)
    names = {key for key, _ in model.named_parameters()}
    assert model.no_weight_decay() <= names
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    by_name = {key: scales[id(p)] for key, p in model.named_parameters() if p.requires_grad}
    assert len(scales) == len(by_name)
    first, last = model.pretrained_cfg["first_conv"], model.pretrained_cfg["classifier"]
    assert by_name[f"{first}.weight"] == min(by_name.values())
    assert by_name[f"{last if isinstance(last, str) else last[0]}.weight"] == max(by_name.values()) == 1
    assert len(set(by_name.values())) >= 4


@pytest.mark.parametrize("indices", [None, 2, [0, -1]], ids=str)
@torch.inference_mode()
def test_intermediates_as_in_timm(name: str, indices: int | list[int] | None) -> None:
    model = small(name)
    x = image(1, (64, 96), model)
    every = model.forward_intermediates(x, intermediates_only=True)
    chosen = {None: every, 2: every[-2:], "[0, -1]": [every[0], every[-1]]}[
        indices if indices in (None, 2) else str(indices)
    ]
    some = model.forward_intermediates(x, indices, intermediates_only=True, stop_early=True)
    assert all(torch.equal(ours, expected) for ours, expected in zip(some, chosen, strict=True))
    tokens = model.forward_intermediates(x, indices, output_fmt="NLC", intermediates_only=True)
    assert all(torch.equal(t, m.flatten(2).transpose(1, 2)) for t, m in zip(tokens, chosen, strict=True))
    layers = model.get_intermediate_layers(x, [0], reshape=True)
    assert torch.equal(layers[0], every[0])


@torch.inference_mode()
def test_dense_form_hands_out_maps(name: str) -> None:
    """As detectors take them: no head, the maps that `feature_sizes` predicts."""
    model = small(name, dense=True)
    x = image(2, (97, 131), model)
    maps = model(x)
    predicted = model.feature_sizes(*x.shape[-2:])
    sizes_of_levels = {(info["num_chs"], *size) for info, size in zip(model.feature_info, predicted, strict=True)}
    assert maps
    assert all((map_.shape[1], *map_.shape[-2:]) in sizes_of_levels for map_ in maps)
    assert all(close(m, torch.cat([model(one[None])[i] for one in x]), 2e-6) for i, m in enumerate(maps))
    assert not [key for key in model.state_dict() if key.startswith("head")]


@torch.inference_mode()
def test_folded_norms_change_nothing(name: str) -> None:
    model = small(name)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            as_a(Tensor, module.running_mean).normal_(std=0.3)
            as_a(Tensor, module.running_var).uniform_(0.5, 2)
    x = image(1, (97, 131), model)
    expected = model(x)
    assert close(model.fold_norms()(x), expected, 1e-5)


def test_own_names_are_no_published_ones(name: str) -> None:
    model = small(name)
    assert type(model).from_published(model.state_dict()).keys() == model.state_dict().keys()


def test_parameters_that_nothing_reads_are_named(name: str) -> None:
    model = small(name)
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {key for key, _ in model.named_parameters() if any(part in key for part in model.unused)}


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_per_size(name: str) -> None:
    """No graph break; `dynamic=False` makes a graph for each size, as the training option `compile` does."""
    model = small(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    for size in ((64, 64), (50, 75)):
        x = image(1, size, model)
        assert close(compiled(x), model(x), 1e-5)


def test_unknown_option_names_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match="drop_path_rate"):
        create_model(name, drop_path_rat=0.1)


def test_input_size_callers(name: str) -> None:
    model = small(name)
    model.set_input_size(img_size=(96, 300))
    with pytest.raises(ValueError, match="minimum"):
        model.set_input_size(img_size=0)
