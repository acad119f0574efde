"""GPViT: the detection form at any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from anyres.models._registry import create_model
from anyres.models.gpvit import GPViT
from tests.typed import as_a

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 6, "group_tokens": (6, 4)}


@torch.inference_mode()
def test_adapter_pads_to_multiples_of_32_and_crops() -> None:
    torch.manual_seed(0)
    model = as_a(GPViT, create_model("gpvit_l1", **TINY, adapter=True)).eval()
    x = torch.randn(2, 3, 41, 70)
    maps, padded = model(x), model(F.pad(x, (0, 26, 0, 23)))
    assert [tuple(m.shape) for m in maps] == [(2, 24, 11, 18), (2, 24, 6, 9), (2, 24, 3, 5), (2, 24, 2, 3)]
    assert model.feature_sizes(41, 70) == [tuple(m.shape[-2:]) for m in maps]
    for map_, whole in zip(maps, padded, strict=True):
        torch.testing.assert_close(map_, whole[..., : map_.shape[-2], : map_.shape[-1]])


def test_adapter_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    model = create_model("gpvit_l1", **TINY, adapter=True).train()
    sum((m * torch.randn_like(m)).sum() for m in model(torch.randn(2, 3, 40, 64))).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_group_tokens_must_fit_the_depth() -> None:
    with pytest.raises(ValueError, match="layers 1, 4, 7"):
        create_model("gpvit_l1", depth=6)


def test_pooling_can_be_exchanged() -> None:
    model = as_a(GPViT, create_model("gpvit_l3", **TINY, num_classes=5)).eval()
    x = torch.randn(1, 3, 32, 40)
    model.reset_classifier(5, "group")
    assert any(name.startswith("neck.") for name in model.state_dict())
    assert model(x).shape == (1, 5)
    model.reset_classifier(5, "avg")
    assert not any(name.startswith("neck.") for name in model.state_dict())


@torch.no_grad()
def test_adapter_names_the_modules_that_return_its_maps() -> None:
    model = as_a(GPViT, create_model("gpvit_l1", **TINY, adapter=True)).eval()
    seen: list[torch.Tensor] = []
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda _, __, out: seen.insert(0, out))
    maps = model(torch.randn(2, 3, 41, 70))
    assert model.output_fmt == "NCHW"
    assert len(seen) == len(maps) == 4
    for out, map_ in zip(seen, maps, strict=True):
        assert torch.equal(out[..., : map_.shape[-2], : map_.shape[-1]], map_)
