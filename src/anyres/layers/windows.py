"""Window attention: partitioning, shifting, padding, masking and merging maps, all in one place.

A map (B, H, W, C) is zero-padded at the right and bottom to multiples of the window, rolled if the windows are shifted,
and partitioned into (B, n, wh·ww, C), with windows and the tokens of each window in row-major order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.layers.parameter_cache import cached_for_parameter
from anyres.layers.parts import parts_of
from anyres.layers.positions import relative_bias
from anyres.layers.size_cache import cached_by_size
from anyres.shapes import Grid


def padded_grid(grid: Grid, window: Grid) -> Grid:
    """Return the smallest multiple of the window that covers the grid."""
    return -(-grid[0] // window[0]) * window[0], -(-grid[1] // window[1]) * window[1]


def cut_window(grid: Grid, size: int) -> Grid:
    """Return size×size, reduced to the map's sides where they are shorter; the results with masked padding are the
    same.

    The window is not reduced while a graph is captured, because a symbolic window size makes its size arithmetic
    intractable.
    """
    if torch.compiler.is_compiling():
        return size, size
    return min(grid[0], size), min(grid[1], size)


def window_rule(grid: Grid, size: int) -> tuple[Grid, Grid]:
    """Return (window, shift of the odd blocks) for a stage of Swin's classifier with size×size windows.

    If the map is no larger than the window along one side, it is never shifted, and its window is reduced to the map
    (the published code does so if both sides are a multiple of the reduced window). Any larger map is shifted by half a
    window.
    """
    if min(grid) <= size:
        return cut_window(grid, size), (0, 0)
    return (size, size), (size // 2, size // 2)


@cached_by_size()
def window_order(padded: Grid, window: Grid, shift: Grid, device: torch.device) -> Tensor:
    """Return (n·N,): where each token of the windows comes from in the padded map, both in row-major order."""
    rows = (torch.arange(padded[0], device=device) + shift[0]) % padded[0]
    columns = (torch.arange(padded[1], device=device) + shift[1]) % padded[1]
    rolled = rows[:, None] * padded[1] + columns
    return rolled.view(-1, window[0], padded[1] // window[1], window[1]).transpose(1, 2).flatten()


@cached_by_size()
def map_order(grid: Grid, window: Grid, shift: Grid, before: Grid, device: torch.device) -> Tensor:
    """Return (H·W,): where each token of the map is found in the windows, both in row-major order."""
    padded = padded_grid(grid, window)
    rows = ((torch.arange(grid[0], device=device) + before[0] - shift[0]) % padded[0])[:, None]
    columns = (torch.arange(grid[1], device=device) + before[1] - shift[1]) % padded[1]
    number = rows // window[0] * (padded[1] // window[1]) + columns // window[1]
    return ((number * window[0] + rows % window[0]) * window[1] + columns % window[1]).flatten()


def partition(x_BHWC: Tensor, window: Grid, shift: Grid = (0, 0), before: Grid = (0, 0)) -> Tensor:
    """Partition a map into windows: (B, H, W, C) → (B, n, wh·ww, C). Row r of the padded map moves to r - shift,
    cyclically.

    `before` is the number of zero rows and columns placed at the top and left instead of the bottom and right.
    """
    B, H, W, C = x_BHWC.shape
    Hp, Wp = padded_grid((H, W), window)
    if (Hp, Wp) != (H, W):
        x_BHWC = F.pad(x_BHWC, (0, 0, before[1], Wp - W - before[1], before[0], Hp - H - before[0]))
    if shift != (0, 0):  # one gather: rolling and then partitioning would take at least two passes over the map
        order = window_order((Hp, Wp), window, shift, x_BHWC.device)
        return x_BHWC.flatten(1, 2).index_select(1, order).view(B, -1, window[0] * window[1], C)
    cut = x_BHWC.view(B, Hp // window[0], window[0], Wp // window[1], window[1], C).transpose(2, 3)
    return cut.reshape(B, -1, window[0] * window[1], C)


def merge(x_BnNC: Tensor, grid: Grid, window: Grid, shift: Grid = (0, 0), before: Grid = (0, 0)) -> Tensor:
    """Undo `partition`: (B, n, wh·ww, C) → (B, H, W, C), contiguous, without padding."""
    B, C = x_BnNC.shape[0], x_BnNC.shape[-1]
    if shift != (0, 0) or padded_grid(grid, window) != grid:
        order = map_order(grid, window, shift, before, x_BnNC.device)
        return x_BnNC.flatten(1, 2).index_select(1, order).view(B, *grid, C)
    cut = x_BnNC.reshape(B, grid[0] // window[0], grid[1] // window[1], window[0], window[1], C).transpose(2, 3)
    return cut.reshape(B, *grid, C)


@cached_by_size()
def shift_mask(padded: Grid, window: Grid, shift: Grid, device: torch.device) -> Tensor:
    """Return (n, N, N) bool, true where two tokens of a window may attend to each other (Swin, section 3.2).

    The rows of the rolled map form the bands [0, H-wh), [H-wh, H-shift), [H-shift, H), and so do the columns. Tokens
    attend only within their own band.
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
    """Return (n, 1, N) bool, true for keys that are not padding, or None if there is no padding."""
    if padded_grid(grid, window) == grid:
        return None
    real = torch.ones(1, *grid, 1, device=device)
    return partition(real, window, before=before)[0, :, None, :, 0] > 0


def small_offsets(table: Tensor, window: Grid) -> Tensor:
    """Return the middle (heads, 2·wh-1, 2·ww-1) of a bias table: the offsets that occur in a window of this size."""
    rows, columns = 2 * window[0] - 1, 2 * window[1] - 1
    top, left = (table.shape[1] - rows) // 2, (table.shape[2] - columns) // 2
    assert min(top, left) >= 0
    return table[:, top : top + rows, left : left + columns]


@cached_for_parameter()
def shifted_bias(table: Tensor, window: Grid, padded: Grid, shift: Grid, grid: Grid | None = None) -> Tensor:
    """Return the relative bias of a table (heads, 2·Mh-1, 2·Mw-1) with the shift mask merged in.

    The result is (n, heads, N, N), or (1, heads, N, N) if nothing is masked. A window smaller than the table's Mh×Mw
    uses its small offsets. `grid` is the map's size without padding; if given, padding is masked too.
    """
    bias = relative_bias(small_offsets(table, window), window)
    allowed = None
    if shift != (0, 0):
        allowed = shift_mask(padded, window, shift, table.device)
    if grid is not None and grid != padded:
        # Padding attends to padding, so that no row of the softmax is fully masked.
        real = partition(torch.ones(1, *grid, 1, device=table.device), window, shift)[0, :, :, 0]
        alike = real[:, :, None] == real[:, None, :]
        allowed = alike if allowed is None else allowed & alike
    return bias if allowed is None else bias.masked_fill(~allowed[:, None], float("-inf"))


def window_attention(qkv_BnNC: Tensor, num_heads: int, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Softmax attention within each window: (B, n, N, 3·C), ordered [q | k | v] and head-major, → (B, n, N, C).

    `mask` is added to the logits (or is bool, true where allowed) and must broadcast to (n, heads, N, N).
    """
    B, n, N, _ = qkv_BnNC.shape
    q, k, v = qkv_BnNC.reshape(B * n, N, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    if mask is not None:
        if mask.shape[0] != 1:
            mask = mask.expand(B, *mask.shape).flatten(0, 1)
        if mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).reshape(B, n, N, -1)


class WindowAttention(nn.Module):
    """Attention within (shifted) windows of a map, with a relative bias per head (Swin, section 3.2, equation 4).

    The output channels of `qkv` are ordered [q | k | v], each head-major. `bias_table` (heads, 2M-1, 2M-1) has the
    biases by query position minus key position.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, num_heads)
        self.bias_table = nn.Parameter(torch.empty(num_heads, 2 * window_size - 1, 2 * window_size - 1))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor, window: Grid, shift: Grid = (0, 0), mask_padding: bool = True) -> Tensor:
        """Apply attention to (B, H, W, C); windows may be smaller than the table's, and then use its small offsets.

        The map is zero-padded to whole windows. With `mask_padding` the padding is masked as keys; otherwise it takes
        part through the bias of `qkv`, as in Swin's detectors.
        """
        grid = (x_BHWC.shape[1], x_BHWC.shape[2])
        padded = padded_grid(grid, window)
        bias = shifted_bias(self.bias_table, window, padded, shift, grid if mask_padding else None)
        x_BnNC = window_attention(self.qkv(partition(x_BHWC, window, shift)), self.num_heads, bias)
        return merge(self.proj(x_BnNC), grid, window, shift)


PUBLISHED_TABLE = "relative_position_bias_table"
"""Name of `bias_table`, there with shape ((2M-1)², heads), in Swin's code and most code derived from it."""


def tables_from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert every published bias table ((2M-1)², heads) in a state dict to our `bias_table` (heads, 2M-1, 2M-1)."""
    return {
        name.replace(PUBLISHED_TABLE, "bias_table"): tensor.T.unflatten(1, (math.isqrt(len(tensor)), -1)).contiguous()
        if name.endswith(PUBLISHED_TABLE) and tensor.ndim == 2 and math.isqrt(len(tensor)) ** 2 == len(tensor) > 0
        else tensor
        for name, tensor in state.items()
    }


def tables_to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `tables_from_published`."""
    return {
        name.replace("bias_table", PUBLISHED_TABLE): tensor.flatten(1).T.contiguous()
        if name.endswith(".bias_table")
        else tensor
        for name, tensor in state.items()
    }
