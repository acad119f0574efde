"""CvT: the scale of the attention."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from anyres.models.cvt import ConvProjectionAttention


@torch.no_grad()
def test_class_token_skips_the_convolutions_and_the_scale_is_the_width() -> None:
    """Equation 2 written out, with explicit scores."""
    torch.manual_seed(0)
    attn = ConvProjectionAttention(12, 3).eval()
    x = torch.randn(2, 1 + 5 * 3, 12)
    parts = []
    for name in "qkv":
        conv, linear = getattr(attn, f"conv_proj_{name}"), getattr(attn, f"proj_{name}")
        tokens = conv(x[:, 1:].reshape(2, 5, 3, 12)).reshape(2, -1, 12)
        parts.append(linear(torch.cat((x[:, :1], tokens), dim=1)).view(2, -1, 3, 4).transpose(1, 2))
    q, k, v = parts
    assert k.shape[2] == 1 + 3 * 2
    out = F.softmax(q @ k.transpose(2, 3) * 12**-0.5, dim=-1) @ v
    torch.testing.assert_close(attn(x, (5, 3)), attn.proj(out.transpose(1, 2).reshape(x.shape)))
