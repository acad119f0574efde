from __future__ import annotations

import pytest
import torch

from anyres.layers.attention import Block
from anyres.models.twins import LocallyGroupedAttention, Twins
from tests.contract.small import image, small
from tests.typed import as_a


def by_hand(attn: LocallyGroupedAttention, x: torch.Tensor, hide: bool) -> torch.Tensor:
    """Window by window with an explicit attention matrix; padded tokens are zero vectors, hidden from the others."""
    B, H, W, C = x.shape
    side = attn.window[0]
    out = torch.zeros(B, H + side, W + side, C)
    for top in range(0, H, side):
        for left in range(0, W, side):
            tokens = torch.zeros(B, side, side, C)
            part = x[:, top : top + side, left : left + side]
            tokens[:, : part.shape[1], : part.shape[2]] = part
            real = torch.zeros(side, side, dtype=torch.bool)
            real[: part.shape[1], : part.shape[2]] = True
            q, k, v = attn.qkv(tokens.flatten(1, 2)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
            if hide:
                logits = logits - 1000 * (~real.flatten()).float()
            y = (logits.softmax(-1) @ v).transpose(1, 2).reshape(B, side, side, C)
            out[:, top : top + side, left : left + side] = y
    return attn.proj(out[:, :H, :W])


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("grid", [(14, 7), (14, 9), (9, 14), (9, 10), (3, 2)], ids=str)
@torch.inference_mode()
def test_windows_against_the_published_padding_rules(grid: tuple[int, int], mask_padding: bool) -> None:
    torch.manual_seed(0)
    attn = LocallyGroupedAttention(12, 2, mask_padding=mask_padding)
    x = torch.randn(2, *grid, 12)
    hide = mask_padding and bool(grid[0] % 7 and grid[1] % 7)
    assert torch.allclose(attn(x), by_hand(attn, x, hide), atol=1e-6)


@torch.inference_mode()
def test_dense_svt_has_the_stage_norms_inline() -> None:
    dense = small("twins_svt_small", dense=True)
    whole = as_a(Twins, small("twins_svt_small", stage_norms=True))
    missing, unexpected = dense.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    assert set(unexpected) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    x = image(1, (97, 131), dense)
    expected = whole.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(ours, map_) for ours, map_ in zip(dense(x), expected, strict=True))
    last = expected[-1].permute(0, 2, 3, 1)
    assert torch.allclose(whole.forward_features(x), whole.norm(last))


def test_attention_takes_turns() -> None:
    for name, windows in (("twins_svt_small", 5), ("twins_pcpvt_small", 0)):
        attentions = [block.attn for block in small(name, depths=(1, 2, 3, 2)).modules() if isinstance(block, Block)]
        assert sum(isinstance(attn, LocallyGroupedAttention) for attn in attentions) == windows
