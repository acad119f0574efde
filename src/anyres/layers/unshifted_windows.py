"""Attention within windows that are never shifted and have no position bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anyres.layers.parts import parts_of
from anyres.layers.windows import merge, partition, window_attention, window_padding
from anyres.shapes import Grid


class UnshiftedWindowAttention(nn.Module):
    """Multi-head attention within square windows of a map, the local half of Twins-SVT and ScalableViT.

    The map is zero-padded at the right and bottom to multiples of the window, before `qkv`, so that one map is copied
    instead of three. A padded token's q, k and v are therefore their biases.
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
        """Return the heads' output (B, H, W, C), contiguous, and the values in windows (B, n·wh·ww, C)."""
        grid = (x_BHWC.shape[1], x_BHWC.shape[2])
        qkv_BMC = self.qkv(partition(x_BHWC, self.window))
        mask = self.mask(grid, x_BHWC.device)
        out_BMC = window_attention(qkv_BMC, self.num_heads, self.window[0] * self.window[1], mask)
        return merge(out_BMC, grid, self.window).contiguous(), qkv_BMC.chunk(3, dim=-1)[2]

    def mask(self, grid: Grid, device: torch.device) -> Tensor | None:
        """Return the mask of `window_attention`, or None; by default that of the padding."""
        return window_padding(grid, self.window, self.num_heads, device)
