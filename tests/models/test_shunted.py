"""Shunted attention on maps smaller than a cell, and with rows that fill none."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from anyres.models.shunted import ShuntedAttention, TokenAggregation


@torch.no_grad()
def test_merging_floors_and_pads_small_maps_to_one_cell() -> None:
    torch.manual_seed(0)
    merge = TokenAggregation(16, 4)
    x = torch.randn(2, 11, 6, 16)
    for ours, expected in zip(merge(x), merge(x[:, :8, :4]), strict=True):
        assert ours.shape == (2, 2, 8)
        assert torch.equal(ours, expected)
    small = x[:, :3, :2]
    for ours, expected in zip(merge(small), merge(F.pad(small, (0, 0, 0, 2, 0, 1))), strict=True):
        assert torch.equal(ours, expected)


@torch.no_grad()
def test_each_half_of_the_heads_sees_its_own_scale() -> None:
    torch.manual_seed(0)
    attention = ShuntedAttention(16, 4, 4)
    x = torch.randn(1, 8, 8, 16)
    attention.set_submodule("proj", torch.nn.Identity())
    out = attention(x).view(64, 4, 4).transpose(0, 1)  # (heads, N, d)
    q = attention.q(x).view(64, 4, 4).transpose(0, 1)
    for heads, group in zip((slice(0, 2), slice(2, 4)), attention.groups, strict=True):
        k, v = (part.view(-1, 2, 4).transpose(0, 1) for part in group(x))
        expected = (q[heads] @ k.mT / 2).softmax(-1) @ v
        assert torch.allclose(out[heads], expected, atol=1e-6)
