"""Factorised attention against its equations, term by term."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from anyres.models.mpvit import FactorisedAttention, RelativePosition
from tests.typed import as_a


@torch.no_grad()
def test_attention_is_the_paper_s_equation() -> None:
    torch.manual_seed(0)
    dim, heads, (H, W) = 32, 8, (5, 9)
    attention, relative = FactorisedAttention(dim), RelativePosition(dim)
    x = torch.randn(2, H, W, dim)
    q, k, v = attention.qkv(x.flatten(1, 2)).view(2, H * W, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    factor = q @ (k.softmax(dim=2).transpose(2, 3) @ v)
    image = v.transpose(2, 3).reshape(2, dim, H, W)
    parts = image.split([2 * dim // heads, 3 * dim // heads, 3 * dim // heads], dim=1)
    convs = [as_a(torch.nn.Conv2d, conv) for conv in relative.conv_list]
    convolved = torch.cat(
        [
            F.conv2d(part, conv.weight, conv.bias, padding=side // 2, groups=part.shape[1])
            for part, conv, side in zip(parts, convs, (3, 5, 7), strict=True)
        ],
        dim=1,
    )
    position = q * convolved.view(2, heads, -1, H * W).transpose(2, 3)
    out = (factor * (dim // heads) ** -0.5 + position).transpose(1, 2).reshape(2, H, W, dim)
    assert torch.allclose(attention(x, relative), attention.proj(out), atol=1e-5)
