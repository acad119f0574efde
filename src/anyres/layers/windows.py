"""Attention inside windows of a map: cut, shift, pad, mask, and put together again, in one place.

A map (B, H, W, C) is zero-padded at the right and the bottom to multiples of the window, rolled if the windows are
shifted, and cut into (B, n, wh·ww, C): windows row by row, tokens inside a window row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from anyres.layers.parameter_cache import cached_for_parameter
from anyres.layers.positions import Grid, relative_bias
from anyres.layers.size_cache import cached_by_size


def padded_grid(grid: Grid, window: Grid) -> Grid:
    """The smallest multiple of the window that covers the grid."""
    return -(-grid[0] // window[0]) * window[0], -(-grid[1] // window[1]) * window[1]


def partition(x_BHWC: Tensor, window: Grid, shift: Grid = (0, 0), before: Grid = (0, 0)) -> Tensor:
    """(B, H, W, C) → (B, n, wh·ww, C). Row r of the padded map goes to row r - shift (cyclically).

    `before`: how many of the zero rows and columns stand at the top and the left instead of the bottom and the right.
    """
    B, H, W, C = x_BHWC.shape
    Hp, Wp = padded_grid((H, W), window)
    if (Hp, Wp) != (H, W):
        x_BHWC = F.pad(x_BHWC, (0, 0, before[1], Wp - W - before[1], before[0], Hp - H - before[0]))
    if shift != (0, 0):
        x_BHWC = torch.roll(x_BHWC, (-shift[0], -shift[1]), (1, 2))
    cut = x_BHWC.view(B, Hp // window[0], window[0], Wp // window[1], window[1], C).transpose(2, 3)
    return cut.reshape(B, -1, window[0] * window[1], C)


def merge(x_BnNC: Tensor, grid: Grid, window: Grid, shift: Grid = (0, 0), before: Grid = (0, 0)) -> Tensor:
    """The inverse of `partition`: (B, n, wh·ww, C) → (B, H, W, C), padding removed."""
    B, C = x_BnNC.shape[0], x_BnNC.shape[-1]
    Hp, Wp = padded_grid(grid, window)
    cut = x_BnNC.reshape(B, Hp // window[0], Wp // window[1], window[0], window[1], C).transpose(2, 3)
    x = cut.reshape(B, Hp, Wp, C)
    if shift != (0, 0):
        x = torch.roll(x, shift, (1, 2))
    if (Hp, Wp) != grid:
        x = x[:, before[0] : before[0] + grid[0], before[1] : before[1] + grid[1]]
    return x


@cached_by_size()
def shift_mask(padded: Grid, window: Grid, shift: Grid, device: torch.device) -> Tensor:
    """(n, N, N) bool, true where two tokens of a window may see each other in the rolled map (Swin, section 3.2).

    Rows of the rolled map fall into the bands [0, H-wh), [H-wh, H-shift), [H-shift, H), columns likewise; tokens see
    only their own band.
    """

    def bands(side: int, extent: int, offset: int) -> Tensor:
        position = torch.arange(side, device=device)
        return (position >= side - extent).int() + (position >= side - offset).int()

    rows, columns = bands(padded[0], window[0], shift[0]), bands(padded[1], window[1], shift[1])
    label = (rows[:, None] * 3 + columns[None])[None, :, :, None]
    label_nN = partition(label, window)[0, :, :, 0]
    return label_nN[:, :, None] == label_nN[:, None, :]


@cached_by_size()
def padding_mask(grid: Grid, window: Grid, device: torch.device, before: Grid = (0, 0)) -> Tensor | None:
    """(n, 1, N) bool, true for keys that are no padding; None if nothing is padded."""
    if padded_grid(grid, window) == grid:
        return None
    real = torch.ones(1, *grid, 1, device=device)
    return partition(real, window, before=before)[0, :, None, :, 0] > 0


@cached_for_parameter()
def shifted_bias(table: Tensor, window: Grid, padded: Grid, shift: Grid) -> Tensor:
    """Relative bias of a table (heads, 2·wh-1, 2·ww-1) with the shift mask merged in: (n, heads, N, N), or (1, heads,
    N, N) without a shift."""
    bias = relative_bias(table, window)
    if shift == (0, 0):
        return bias
    allowed = shift_mask(padded, window, shift, table.device)
    return bias.masked_fill(~allowed[:, None], float("-inf"))


def window_attention(qkv_BnNC: Tensor, num_heads: int, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Softmax attention inside each window: (B, n, N, 3·C), ordered [q | k | v] and head-major, → (B, n, N, C).

    `mask`: added to the logits (or bool, true where allowed), broadcastable to (n, heads, N, N).
    """
    B, n, N, _ = qkv_BnNC.shape
    q, k, v = qkv_BnNC.view(B * n, N, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    if mask is not None:
        if mask.shape[0] != 1:
            mask = mask.expand(B, *mask.shape).flatten(0, 1)
        if mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).reshape(B, n, N, -1)
