"""Multi-head self-attention and the pre-norm block around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.layers.divisions import divide, divided_attention, padded_division_attention
from anyres.layers.parts import parts_of
from anyres.layers.positions import LocalPositionEmbedding, LogitBias, ParabolicBias, QueryKeyMap
from anyres.layers.windows import merge, partition, window_attention
from anyres.shapes import Grid


class Attention(nn.Module):
    """Softmax attention over all tokens of one grid, prefix tokens first; the rotation that is passed in adds
    positions.

    With `window`, patches attend only to the patches of their own window of that side, and there are no prefix tokens.
    With `division`, the grid is divided into that many windows per side; prefix tokens attend to every token and are
    attended to by every token. `qkv` is one linear layer with output channels ordered [q | k | v], each head-major.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        bias: LogitBias | None = None,
        parabolas: ParabolicBias | None = None,
        local: LocalPositionEmbedding | None = None,
        window: int | None = None,
        division: int = 1,
    ) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.bias = bias
        self.parabolas = parabolas
        self.local = local
        self.window = window
        self.division = division
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x_BNC: Tensor, grid: Grid, transforms: Sequence[QueryKeyMap] = (), queries: int | None = None
    ) -> Tensor:
        """Apply attention: (B, N, C) → (B, N, C), or (B, queries, C) for only the first `queries` rows."""
        if self.window is not None:
            return self.attend_in_windows(x_BNC, grid, (self.window, self.window))
        num_prefix = x_BNC.shape[1] - grid[0] * grid[1]
        qkv_BNC = self.qkv(x_BNC)
        if self.division == 1:
            out_BNC = self.attend(qkv_BNC, grid, num_prefix, transforms, queries)
        else:
            out_BNC = self.attend_in_divisions(qkv_BNC, grid, num_prefix)[:, :queries]
        if self.local is not None:
            v_BNC = qkv_BNC.chunk(3, dim=-1)[2][:, num_prefix:]
            out_BNC = out_BNC + F.pad(self.local(v_BNC, grid, self.num_heads), (0, 0, num_prefix, 0))[:, :queries]
        return self.proj_drop(self.proj(out_BNC))

    def heads(self, qkv_BNC: Tensor) -> Iterator[Tensor]:
        """Split q, k and v from the output of `qkv`: (B, heads, N, d) each."""
        return (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in qkv_BNC.chunk(3, dim=-1))

    def attend(
        self, qkv_BNC: Tensor, grid: Grid, num_prefix: int, transforms: Sequence[QueryKeyMap], queries: int | None
    ) -> Tensor:
        """Attend from every row to every row: (B, N, 3·C) → (B, N or queries, C)."""
        q, k, v = self.heads(qkv_BNC)
        q = q[:, :, :queries]
        if self.parabolas is not None:  # read from the queries as they are, added when all else is done to them
            transforms = (*transforms, self.parabolas(q, grid, num_prefix))
        for each in transforms:
            q, k = each.queries(q), each.keys(k)
        mask = None if self.bias is None else self.bias(grid, num_prefix, q)[:, :, :queries]
        dropout = self.attn_drop if self.training else 0.0
        # Fused kernels want values of the width of queries and keys, which may have become wider.
        width = v.shape[-1]
        if q.shape[-1] > width:
            v = F.pad(v, (0, q.shape[-1] - width))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=width**-0.5)
        return out[..., :width].transpose(1, 2).flatten(2)

    def attend_in_divisions(self, qkv_BNC: Tensor, grid: Grid, num_prefix: int) -> Tensor:
        """Attend within the windows of `division`: (B, N, 3·C) → (B, N, C)."""
        dropout = self.attn_drop if self.training else 0.0
        if torch.compiler.is_compiling():
            q, k, v = self.heads(qkv_BNC)
            out = padded_division_attention(q, k, v, grid, self.division, num_prefix, dropout)
            return out.transpose(1, 2).flatten(2)
        windows = divide(grid, self.division, num_prefix, qkv_BNC.device)
        q, k, v = self.heads(qkv_BNC.index_select(1, windows.order))
        out = divided_attention(q, k, v, windows, num_prefix, dropout)
        return out.transpose(1, 2).flatten(2).index_select(1, windows.inverse)

    def attend_in_windows(self, x_BNC: Tensor, grid: Grid, window: Grid) -> Tensor:
        """Attend within square windows: (B, h·w, C) → the same.

        The zero padding of incomplete windows provides keys like any others (ViTDet). The local term is computed on the
        whole map without padding.
        """
        qkv_BMC = self.qkv(partition(x_BNC.unflatten(1, grid), window))
        dropout = self.attn_drop if self.training else 0.0
        out_BMC = window_attention(qkv_BMC, self.num_heads, window[0] * window[1], dropout=dropout)
        out = merge(out_BMC, grid, window).flatten(1, 2)
        if self.local is not None:
            v_BNC = merge(qkv_BMC.chunk(3, dim=-1)[2], grid, window).flatten(1, 2)
            out = out + self.local(v_BNC, grid, self.num_heads)
        return self.proj_drop(self.proj(out))


class Block(nn.Module):
    """Pre-norm transformer block: x ← x + DropPath(Attn(LN(x))); x ← x + DropPath(MLP(LN(x))) (ViT, equations 2 and 3).

    Works on tokens (B, N, C) and on maps (B, H, W, C); only the attention depends on the shape. If the attention
    returns only the first rows of its input, so does the block.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float = 0.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp
        # Two modules, so that each branch has its own random draws.
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Apply the block; `context` is passed on to the attention after the tokens."""
        y = self.drop_path1(self.attn(self.norm1(x), *context))
        x = x[:, : y.shape[1]] + y
        return x + self.drop_path2(self.mlp(self.norm2(x)))
