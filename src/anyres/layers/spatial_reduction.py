"""Spatial-reduction attention: every position attends to a downsampled copy of the map."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from anyres.layers.maps import on_map, pad_to_cell
from anyres.layers.parts import parts_of


def attend(q_BNC: Tensor, k_BMC: Tensor, v_BMC: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Multi-head softmax attention of head-major channels: (B, N, C), (B, M, C), (B, M, C') → (B, N, C').

    If C and C' differ, the narrower heads are zero-padded, because the fused kernels need equal widths (on a CPU they
    take between a half and a sixth of the time of the kernel that does not).
    """
    q, k, v = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q_BNC, k_BMC, v_BMC))
    key_width, value_width = k.shape[-1], v.shape[-1]
    if key_width < value_width:
        q, k = (F.pad(x, (0, value_width - key_width)) for x in (q, k))
    elif key_width > value_width:
        v = F.pad(v, (0, key_width - value_width))
    out = F.scaled_dot_product_attention(q, k, v, scale=key_width**-0.5 if scale is None else scale)
    return out[..., :value_width].transpose(1, 2).flatten(2)


class SpatialReductionAttention(nn.Module):
    """PVT's SRA (section 3.3), also the global sub-sampled attention of Twins.

    Keys and values come from the map after a convolution with kernel = stride = `reduction`, which ignores incomplete
    cells at the border, and a LayerNorm. With `reduction` 1 they come from the tokens themselves, including a class
    token. A map with a side below `reduction` is zero-padded to one cell. `scale` of the logits defaults to head
    width^-0.5.
    """

    def __init__(
        self, dim: int, num_heads: int, reduction: int = 1, qkv_bias: bool = True, scale: float | None = None
    ) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, num_heads)
        self.scale = scale
        self.reduction = reduction
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention to a map (B, H, W, C), or with `reduction` 1 to tokens (B, N, C); returns the same shape."""
        tokens = x.flatten(1, -2)
        source = tokens if self.reduction == 1 else self.reduce(x)
        k, v = self.kv(source).chunk(2, dim=-1)
        return self.proj(attend(self.q(tokens), k, v, self.num_heads, self.scale)).view(x.shape)

    def reduce(self, x_BHWC: Tensor) -> Tensor:
        """Downsample the map to keys and values: (B, H, W, C) → (B, M, C)."""
        return self.norm(on_map(self.sr, pad_to_cell(x_BHWC, self.reduction)).flatten(1, 2))
