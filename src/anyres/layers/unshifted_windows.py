"""Attention inside windows that never shift and carry no position bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anyres.layers.parts import parts_of
from anyres.layers.windows import merge, padding_mask, partition, window_attention
from anyres.shapes import Grid


class UnshiftedWindowAttention(nn.Module):
    """Multi-head attention inside square windows of a map, which is zero-padded at the right and the bottom to
    multiples of the window: the local half of Twins-SVT and of ScalableViT, whose other half is global.

    The map is cut before `qkv`, so that one map is copied and not three; a padded token has the biases for q, k and v.
    """

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, num_heads)
        self.window = (window, window)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.proj(self.attend(x_BHWC)[0])

    def attend(self, x_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) → the heads' output (B, H, W, C), contiguous, and the values in windows (B, n, wh·ww, C)."""
        grid = (x_BHWC.shape[1], x_BHWC.shape[2])
        qkv_BnNC = self.qkv(partition(x_BHWC, self.window))
        mask = self.key_mask(grid, x_BHWC.device)
        out_BnNC = window_attention(qkv_BnNC, self.num_heads, None if mask is None else mask[:, None])
        return merge(out_BnNC, grid, self.window).contiguous(), qkv_BnNC.chunk(3, dim=-1)[2]

    def key_mask(self, grid: Grid, device: torch.device) -> Tensor | None:
        """(n, 1, wh·ww) bool, true for keys that may be seen; None for all. Here: all but the padding."""
        return padding_mask(grid, self.window, device)
