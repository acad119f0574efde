"""Attention windows that are a fixed fraction of the grid (UViT, section 3.3), so their size follows the input's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from anyres.layers.maps import pad_below
from anyres.layers.size_cache import cached_by_size
from anyres.layers.sizes import ceil_div, crop, regroup
from anyres.shapes import Grid


class Windows(NamedTuple):
    """A token order with contiguous windows, prefix tokens first and windows of equal shape adjacent."""

    order: Tensor
    """(prefix + h·w,) position in the grid's order of each token in window order."""
    inverse: Tensor
    """(prefix + h·w,) position in window order of each token in the grid's order."""
    groups: tuple[tuple[int, int], ...]
    """(windows, tokens per window) for each shape that occurs: interior, right edge, bottom edge, corner."""


@cached_by_size()
def divide(grid: Grid, division: int, num_prefix: int, device: torch.device) -> Windows:
    """Divide a grid into windows of ceil(h / division) x ceil(w / division) tokens, starting at the top left.

    The last window of a row or column is smaller if the windows do not divide the grid.
    """

    def bands(side: int) -> list[tuple[int, int, int]]:
        """Return (first line, number of windows, lines per window) for the full windows and for the rest."""
        extent = -(-side // division)
        full, rest = side // extent, side % extent
        return [(0, full, extent), (full * extent, 1, rest)][: 2 if rest else 1]

    position = torch.arange(grid[0] * grid[1], device=device).view(grid)
    runs, groups = [torch.arange(-num_prefix, 0, device=device)], []
    for top, rows, height in bands(grid[0]):
        for left, columns, width in bands(grid[1]):
            part = position[top : top + rows * height, left : left + columns * width]
            runs.append(part.reshape(rows, height, columns, width).transpose(1, 2).flatten())
            groups.append((rows * columns, height * width))
    order = torch.cat(runs) + num_prefix
    return Windows(order, order.argsort(), tuple(groups))


def divided_attention(
    q_BhNd: Tensor, k_BhNd: Tensor, v_BhNd: Tensor, windows: Windows, num_prefix: int, dropout: float = 0.0
) -> Tensor:
    """Softmax attention within each window, with tokens in window order: (B, h, N, d) → (B, h, N, d).

    Prefix tokens attend to every token and are attended to by every token.
    """
    B = q_BhNd.shape[0]
    parts = []
    if num_prefix:
        first = q_BhNd[:, :, :num_prefix]
        parts.append(F.scaled_dot_product_attention(first, k_BhNd, v_BhNd, dropout_p=dropout).transpose(1, 2))
    start = num_prefix
    for count, length in windows.groups:
        run = slice(start, start + count * length)
        # Windows of equal shape are batched; with a single shape and no prefix this is a view.
        q, k, v = (
            x[:, :, run].unflatten(2, (count, length)).transpose(1, 2).flatten(0, 1) for x in (q_BhNd, k_BhNd, v_BhNd)
        )
        if num_prefix:
            k, v = (
                torch.cat((x[:, :, :num_prefix].repeat_interleave(count, 0), inside), dim=2)
                for x, inside in ((k_BhNd, k), (v_BhNd, v))
            )
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (B·count, h, length, d)
        parts.append(out.transpose(1, 2).reshape(B, count * length, *out.shape[1::2]))
        start = run.stop
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).transpose(1, 2)


def padded_division_attention(
    q_BhNd: Tensor, k_BhNd: Tensor, v_BhNd: Tensor, grid: Grid, division: int, num_prefix: int, dropout: float = 0.0
) -> Tensor:
    """Return what `divided_attention` does, with tokens in the grid's order, for a grid that may be symbols.

    The grid is padded to division x division windows of equal size, and padding is masked as keys.
    """
    B, heads = q_BhNd.shape[:2]
    h, w = (ceil_div(side, division) for side in grid)
    prefix_parts, windows = [], []
    for x in (q_BhNd, k_BhNd, v_BhNd):
        prefix, patches = x[:, :, :num_prefix], x[:, :, num_prefix:].flatten(0, 1).unflatten(1, grid)
        padded = pad_below(patches, division * h - grid[0], division * w - grid[1])
        cut = padded.unflatten(1, (division, h)).unflatten(3, (division, w)).transpose(2, 3)  # (B·heads, n, n, h, w, d)
        cut = regroup(cut, B, heads, division**2, h * w, cut.shape[-1])
        prefix_parts.append(prefix)
        windows.append(cut)
    q, k, v = windows
    device = q.device
    rows, columns = (
        torch.arange(division * extent, device=device).unflatten(0, (division, extent)) < side
        for extent, side in zip((h, w), grid, strict=True)
    )
    real = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(division**2, 1, h * w)
    real = real | ~real.any(-1, keepdim=True)  # a window of padding alone sees itself, since no row may be empty
    if num_prefix:
        k, v = (
            torch.cat((prefix[:, :, None].expand(-1, -1, division**2, -1, -1), inside), dim=3)
            for prefix, inside in zip(prefix_parts[1:], (k, v), strict=True)
        )
        real = F.pad(real, (num_prefix, 0), value=True)
    out = F.scaled_dot_product_attention(
        q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), attn_mask=real.repeat(heads, 1, 1), dropout_p=dropout
    )
    out = regroup(out, B * heads, division, division, h, w, out.shape[-1]).transpose(2, 3)
    out = crop(regroup(out, B * heads, division * h, division * w, out.shape[-1]), 1, grid)
    out = out.flatten(1, 2).unflatten(0, (B, heads))
    if not num_prefix:
        return out
    first = F.scaled_dot_product_attention(prefix_parts[0], k_BhNd, v_BhNd, dropout_p=dropout)
    return torch.cat((first, out), dim=2)
