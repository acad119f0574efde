"""UViT: windows, and one stored kernel for every stride."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from anyres.models._plain import Plain, window_divisions
from anyres.models._registry import create_model
from anyres.models.uvit import UViT
from tests.typed import as_a

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 5, "num_heads": 2}


def test_schedules() -> None:
    assert window_divisions("progressive", 18) == (4,) * 14 + (2,) * 2 + (1,) * 2
    assert window_divisions("constant", 3) == (2, 2, 2)
    assert window_divisions([1, 2, 3], 3) == (1, 2, 3)
    for wrong in ("local", [1, 2], [1, 0, 1], []):
        with pytest.raises(ValueError, match="windows="):
            window_divisions(wrong, 3)


@pytest.mark.parametrize("name", ["uvit_tiny", "resformer_tiny", "deit_tiny_distilled"])
@torch.inference_mode()
def test_progressive_windows_equal_masked_attention(name: str) -> None:
    """The last block of a model with class token computes only that, and the local term of ResFormer works on the
    whole map."""
    torch.manual_seed(0)
    model = as_a(Plain, create_model(name, **TINY, windows=[1, 3, 2, 2, 1], num_classes=5)).eval()
    x = torch.randn(2, 3, 70, 100)
    tokens, grid, _ = model.embed(x)
    P, (h, w) = model.num_prefix_tokens, grid
    for block in model.blocks:
        attn: Any = block.attn  # its parts are exchanged
        division, attn.division = attn.division, 1
        rows = torch.arange(h).repeat_interleave(w) // -(-h // division)
        columns = torch.arange(w).repeat(h) // -(-w // division)
        mask = torch.zeros(P + h * w, P + h * w)
        mask[P:, P:] = ((rows[:, None] != rows) | (columns[:, None] != columns)) * -1e9
        attn.bias = lambda *_, mask=mask: mask[None, None]
        tokens = block(tokens, grid)
        attn.bias, attn.division = None, division
    expected = model.norm(tokens)
    torch.testing.assert_close(model.forward_features(x), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(x), model.forward_head(expected), atol=1e-5, rtol=1e-4)
    levels = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(model.norm(levels[-1]), expected[:, P:], atol=1e-5, rtol=1e-4)


def test_windows_and_positions_between_tokens_do_not_mix() -> None:
    with pytest.raises(ValueError, match="rpb"):
        create_model("uvit_tiny", **TINY, windows="constant", position="rpb")


@torch.inference_mode()
def test_dense_form_takes_the_classifiers_weights() -> None:
    torch.manual_seed(0)
    model = as_a(UViT, create_model("uvit_tiny", **TINY)).eval()
    dense = as_a(UViT, create_model("uvit_tiny", **TINY, dense=True)).eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 3, 60, 41)
    (map_,) = dense(x)
    assert map_.shape == (1, 24, 8, 6)
    kernel = F.avg_pool2d(model.get_parameter("patch_embed.proj.weight"), 2)
    patches = F.conv2d(F.pad(x, (0, 7, 0, 4)), kernel, model.get_parameter("patch_embed.proj.bias"), 8)
    torch.testing.assert_close(dense.patch_embed(x), patches)
    table = model.get_parameter("position.table").unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    expected = patches + F.interpolate(table, (8, 6), mode="bilinear")
    torch.testing.assert_close(dense.embed(x)[0], expected.flatten(2).transpose(1, 2))
