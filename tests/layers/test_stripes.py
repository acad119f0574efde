"""Stripes: each rule against attention over the whole map with a mask, and LePE against its sum of taps."""

from __future__ import annotations

import pytest
import torch

from anyres.layers.stripes import StripeAttention
from tests.typed import as_a


def explicit(layer: StripeAttention, x_BHWC: torch.Tensor) -> torch.Tensor:
    """Scores of all pairs; pairs of different stripes do not count, ghosts count one each in the denominator."""
    B, H, W, C = x_BHWC.shape
    rows = torch.arange(H).repeat_interleave(W)
    columns = torch.arange(W).repeat(H)
    qkv = layer.qkv(x_BHWC).view(B, H * W, 3, len(layer.lepe), layer.branch_heads, -1).permute(2, 3, 0, 4, 1, 5)
    outs = []
    for branch, conv in enumerate(as_a(torch.nn.Conv2d, part) for part in layer.lepe):
        line, side, across = (columns, W, H) if layer.width and branch == 0 else (rows, H, W)
        width = layer.width or side
        padding = -side % width
        shift = padding // 2 if layer.ghosts else 0
        stripe = (line + shift) // width
        same = stripe[:, None] == stripe[None]
        q, k, v = qkv[:, branch]
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).exp() * same
        lines = torch.bincount((torch.arange(side) + shift) // width)
        ghosts = (width - lines[stripe]) * across if layer.ghosts else torch.zeros(H * W)
        out = (scores @ v) / (scores.sum(-1, keepdim=True) + ghosts[:, None])
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                neighbour = (rows[:, None] + dy == rows[None]) & (columns[:, None] + dx == columns[None]) & same
                tap = conv.weight[:, 0, dy + 1, dx + 1].view(layer.branch_heads, 1, -1)
                out = out + (neighbour.float() @ v) * tap
        outs.append(out.transpose(1, 2).flatten(2) + conv.bias)
    return layer.proj(torch.cat(outs, dim=-1)).view(B, H, W, C)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("ghosts", [True, False])
@pytest.mark.parametrize("width", [1, 2, 7, None])
@pytest.mark.parametrize("grid", [(4, 6), (9, 5), (1, 1), (16, 3)])
def test_stripes_equal_masked_attention(grid: tuple[int, int], width: int | None, ghosts: bool, grad: bool) -> None:
    torch.manual_seed(0)
    layer = StripeAttention(12, 4, width, ghosts)
    x = torch.randn(2, *grid, 12)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x), explicit(layer, x), atol=1e-5, rtol=1e-4)


def test_heads_must_fit_the_branches() -> None:
    with pytest.raises(ValueError, match="branches"):
        StripeAttention(9, 3, 2)
