"""Window attention: partitioning, shifting, padding, masking and merging maps, all in one place.

A map (B, H, W, C) is zero-padded at the right and bottom to multiples of the window, rolled if the windows are shifted,
and partitioned into (B, n·wh·ww, C), with windows and the tokens of each window in row-major order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.layers.maps import pad_below
from anyres.layers.parameter_cache import cached_for_parameter
from anyres.layers.parts import parts_of
from anyres.layers.positions import relative_bias
from anyres.layers.size_cache import cached_by_size
from anyres.layers.sizes import ceil_div, is_below, known, regroup, round_up, same, undecided, wrapped
from anyres.shapes import Grid


def padded_grid(grid: Grid, window: Grid) -> Grid:
    """Return the smallest multiple of the window that covers the grid."""
    return round_up(grid[0], window[0]), round_up(grid[1], window[1])


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
    if known(grid[0] <= size) or known(grid[1] <= size):
        return cut_window(grid, size), (0, 0)
    shift = size // 2 * (1 - is_below(grid[0], size + 1)) * (1 - is_below(grid[1], size + 1))
    return (size, size), (shift, shift)


def are_symbols(grid: Grid, window: Grid, shift: Grid = (0, 0)) -> bool:
    """Return whether it depends on symbols if a grid is padded or windows are shifted."""
    padded = padded_grid(grid, window)
    return undecided(padded[0], grid[0]) or undecided(padded[1], grid[1]) or undecided(shift[0], 0)


@cached_by_size()
def window_order(padded: Grid, window: Grid, shift: Grid, device: torch.device) -> Tensor:
    """Return (n·N,): where each token of the windows comes from in the padded map, both in row-major order."""
    rows, columns = (
        wrapped(torch.arange(side, device=device) + offset, side) for side, offset in zip(padded, shift, strict=True)
    )
    rolled = rows[:, None] * padded[1] + columns
    return rolled.view(-1, window[0], padded[1] // window[1], window[1]).transpose(1, 2).flatten()


@cached_by_size()
def map_order(grid: Grid, window: Grid, shift: Grid, device: torch.device) -> Tensor:
    """Return (H·W,): where each token of the map is found in the windows, both in row-major order."""
    padded = padded_grid(grid, window)
    rows, columns = (
        wrapped(torch.arange(side, device=device) + (around - offset), around)
        for side, around, offset in zip(grid, padded, shift, strict=True)
    )
    rows = rows[:, None]
    number = rows // window[0] * (padded[1] // window[1]) + columns // window[1]
    return ((number * window[0] + rows % window[0]) * window[1] + columns % window[1]).flatten()


def partition(x_BHWC: Tensor, window: Grid, shift: Grid = (0, 0), windows: Grid | None = None) -> Tensor:
    """Partition a map into windows: (B, H, W, C) → (B, n·wh·ww, C), one window after the other.

    Row r of the padded map moves to r - shift, cyclically. `windows` are the numbers of windows down and across, if the
    caller has them from elsewhere than the map's size.
    """
    B, H, W, C = x_BHWC.shape
    Hp, Wp = padded_grid((H, W), window)
    if are_symbols((H, W), window, shift):
        return gathered_partition(x_BHWC, window, shift, windows)
    x_BHWC = pad_below(x_BHWC, Hp - H, Wp - W)
    if not same(shift, (0, 0)):  # one gather: rolling and then partitioning would take at least two passes over the map
        order = window_order((Hp, Wp), window, shift, x_BHWC.device)
        return x_BHWC.flatten(1, 2).index_select(1, order)
    cut = x_BHWC.view(B, Hp // window[0], window[0], Wp // window[1], window[1], C).transpose(2, 3)
    return cut.reshape(B, -1, C)


def gathered_partition(x_BHWC: Tensor, window: Grid, shift: Grid, windows: Grid | None = None) -> Tensor:
    """`partition` for a map whose sides are symbols."""
    source, real = window_tokens((x_BHWC.shape[1], x_BHWC.shape[2]), window, shift, x_BHWC.device, windows)
    return torch.where(real[:, None], x_BHWC.flatten(1, 2).index_select(1, source), 0)


def window_places(grid: Grid, window: Grid, device: torch.device, windows: Grid | None = None) -> tuple[Tensor, Tensor]:
    """Return the row and the column (n·N,) in the padded map of every token of the windows, before any shift.

    No axis is a number of windows, which may be 1: a captured graph would hold for this number alone.
    """
    tokens = window[0] * window[1]
    down, across = windows or (ceil_div(grid[0], window[0]), ceil_div(grid[1], window[1]))
    place = torch.arange(down * across * tokens, device=device)
    number, inside = place // tokens, place % tokens
    row = number // across
    return row * window[0] + inside // window[1], (number - row * across) * window[1] + inside % window[1]


def window_tokens(
    grid: Grid, window: Grid, shift: Grid, device: torch.device, windows: Grid | None = None
) -> tuple[Tensor, Tensor]:
    """Return (n·N,) where each token of the windows comes from in the map, and whether it does, or is padding."""
    rows, columns = (
        wrapped(place + offset, side)
        for place, offset, side in zip(
            window_places(grid, window, device, windows), shift, padded_grid(grid, window), strict=True
        )
    )
    source = rows.clamp(max=grid[0] - 1) * grid[1] + columns.clamp(max=grid[1] - 1)
    return source, (rows < grid[0]) & (columns < grid[1])


def merge(x_BMC: Tensor, grid: Grid, window: Grid, shift: Grid = (0, 0)) -> Tensor:
    """Undo `partition`: (B, n·wh·ww, C) → (B, H, W, C), contiguous, without padding."""
    B, C = x_BMC.shape[0], x_BMC.shape[-1]
    if not (same(shift, (0, 0)) and same(padded_grid(grid, window), grid)):
        order = map_order(grid, window, shift, x_BMC.device)
        return x_BMC.index_select(1, order).view(B, *grid, C)
    cut = x_BMC.reshape(B, grid[0] // window[0], grid[1] // window[1], window[0], window[1], C).transpose(2, 3)
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
    label_nN = partition(label, window)[0, :, 0].unflatten(0, (-1, window[0] * window[1]))
    return label_nN[:, :, None] == label_nN[:, None, :]


@cached_by_size()
def padding_mask(grid: Grid, window: Grid, device: torch.device, windows: Grid | None = None) -> Tensor | None:
    """Return (n, 1, N) bool, true for keys that are not padding, or None if there is no padding.

    `windows` are the rows and columns of windows, if they are not derived from the grid.
    """
    if same(padded_grid(grid, window), grid):
        return None
    real = partition(torch.ones(1, *grid, 1, device=device), window, windows=windows)
    return real[0, :, 0].unflatten(0, (-1, 1, window[0] * window[1])) > 0


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
    if not same(shift, (0, 0)):
        allowed = shift_mask(padded, window, shift, table.device)
    if grid is not None and not same(grid, padded):
        # Padding attends to padding, so that no row of the softmax is fully masked.
        real = partition(torch.ones(1, *grid, 1, device=table.device), window, shift)[0, :, 0]
        real = real.unflatten(0, (-1, window[0] * window[1]))
        alike = real[:, :, None] == real[:, None, :]
        allowed = alike if allowed is None else allowed & alike
    return bias if allowed is None else bias.masked_fill(~allowed[:, None], float("-inf"))


@cached_by_size()
def window_labels(grid: Grid, window: Grid, shift: Grid, mask_padding: bool, device: torch.device) -> Tensor:
    """Return a label (n·N,) of every token of the windows; those of a window attend to each other if it is the same.

    It stands for the masks of `shifted_bias` where the grid's sides are symbols.
    """
    bands = []
    for place, side, extent, offset in zip(
        window_places(grid, window, device), padded_grid(grid, window), window, shift, strict=True
    ):
        bands.append((place >= side - extent).int() + (place >= side - offset).int())
    label = bands[0] * 3 + bands[1]
    return torch.where(window_tokens(grid, window, shift, device)[1], label, -1) if mask_padding else label


def window_padding(grid: Grid, window: Grid, num_heads: int, device: torch.device) -> Tensor | None:
    """Return the mask of `window_attention` that hides padding, or None if there is none."""
    if are_symbols(grid, window):
        label = window_labels(grid, window, (0, 0), True, device)
        return label_mask((label < 0).int(), num_heads, window[0] * window[1])
    mask = padding_mask(grid, window, device)
    return None if mask is None else mask[:, None]


def label_mask(label_M: Tensor, num_heads: int, tokens: int, bias_hNN: Tensor | None = None) -> Tensor:
    """Return the mask (heads·n, N, N) for windows of N tokens that these labels stand for.

    It is bool, true for equal labels; with a bias, it is the bias there and -inf elsewhere.
    """
    place = torch.arange(label_M.shape[0], device=label_M.device)
    keys = (place // tokens * tokens)[:, None] + torch.arange(tokens, device=label_M.device)
    allowed = label_M[:, None] == label_M[keys]
    if bias_hNN is None:
        return regroup(allowed.expand(num_heads, -1, -1), -1, tokens, tokens)
    mask = bias_hNN.index_select(1, place % tokens).masked_fill(~allowed, float("-inf"))
    return regroup(mask, -1, tokens, tokens)


def window_attention(
    qkv_BMC: Tensor, num_heads: int, tokens: int, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention within each window of N `tokens`: (B, n·N, 3·C), ordered [q | k | v] and head-major, →
    (B, n·N, C).

    `mask` is added to the logits (or is bool, true where allowed). It must broadcast to (n, heads, N, N), or is
    (heads·n, N, N).
    """
    B, M, _ = qkv_BMC.shape
    heads_first = torch.compiler.is_compiling() and (mask is None or mask.ndim == 3)  # no axis is the number of windows
    if heads_first:
        qkv = qkv_BMC.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, n·N, d)
        q, k, v = regroup(qkv, 3, B, num_heads * (M // tokens), tokens, qkv.shape[-1])
    else:
        q, k, v = qkv_BMC.reshape(-1, tokens, 3, num_heads, qkv_BMC.shape[-1] // (3 * num_heads)).permute(2, 0, 3, 1, 4)
        if mask is not None and not known(mask.shape[0] == 1):
            mask = mask.expand(B, *mask.shape).flatten(0, 1)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if heads_first:
        return regroup(out, B, num_heads, M, out.shape[-1]).transpose(1, 2).flatten(2)
    return out.transpose(1, 2).reshape(B, M, -1)


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
        tokens = window[0] * window[1]
        if are_symbols(grid, window, shift):
            label = window_labels(grid, window, shift, mask_padding, x_BHWC.device)
            bias = relative_bias(small_offsets(self.bias_table, window), window)[0]
            mask = label_mask(label, self.num_heads, tokens, bias)
        else:
            mask = shifted_bias(self.bias_table, window, padded, shift, grid if mask_padding else None)
        x_BMC = window_attention(self.qkv(partition(x_BHWC, window, shift)), self.num_heads, tokens, mask)
        return merge(self.proj(x_BMC), grid, window, shift)


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
