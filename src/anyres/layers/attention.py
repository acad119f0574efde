"""Multi-head self-attention and the pre-norm block around it."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.layers.divisions import Windows, divided_attention, reorder
from anyres.layers.positions import (
    ContinuousBias,
    Grid,
    LocalPositionEmbedding,
    RelativeBiasTable,
    Rotation,
)
from anyres.layers.windows import merge, partition, window_attention


class Attention(nn.Module):
    """Softmax attention over all tokens of one grid, prefix tokens first; positions are whatever is passed in.

    With `window` patches see those of their own window of that side only, and there are no prefix tokens. `qkv` is one
    linear layer whose output channels are ordered [q | k | v], each head-major.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        bias: RelativeBiasTable | ContinuousBias | None = None,
        local: LocalPositionEmbedding | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"A width of {dim} cannot be split into {num_heads} heads: choose a multiple of {num_heads}."
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.bias = bias
        self.local = local
        self.window = window
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x_BNC: Tensor,
        grid: Grid,
        rotation: Rotation | None = None,
        queries: int | None = None,
        windows: Windows | None = None,
    ) -> Tensor:
        """(B, N, C) → (B, N, C), or (B, queries, C): the first `queries` rows (prefix tokens) only, when no other row
        is wanted. With `windows` the tokens lie in their order, and patches see their own window only."""
        if self.window is not None:
            return self.attend_in_windows(x_BNC, grid, (self.window, self.window))
        B, N, C = x_BNC.shape
        num_prefix = N - grid[0] * grid[1]
        if queries is None:
            q_BNC, k_BNC, v_BNC = self.qkv(x_BNC).chunk(3, dim=-1)
        else:
            weight_q, weight_kv = self.qkv.weight.split((C, 2 * C))
            bias_q, bias_kv = (None, None) if self.qkv.bias is None else self.qkv.bias.split((C, 2 * C))
            q_BNC = F.linear(x_BNC[:, :queries], weight_q, bias_q)
            k_BNC, v_BNC = F.linear(x_BNC, weight_kv, bias_kv).chunk(2, dim=-1)
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (q_BNC, k_BNC, v_BNC))
        if rotation is not None:
            q, k = rotation.queries(q), rotation.keys(k)
        mask = None
        if self.bias is not None:
            mask = self.bias(grid, num_prefix)[:, :, : q.shape[2]].to(q.dtype)
        dropout = self.attn_drop if self.training else 0.0
        if windows is None or queries is not None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        else:
            out = divided_attention(q, k, v, windows, num_prefix, dropout)
        out = out.transpose(1, 2).reshape(B, -1, C)
        if self.local is not None and queries is not None:
            # Prefix rows get no local term, but its filters must stay in the graph: distributed training waits for
            # their (zero)
            # gradient.
            assert queries <= num_prefix
            if self.training:
                out = out + 0 * sum(parameter.sum() for parameter in self.local.parameters())
        elif self.local is not None:
            local = self.local(reorder(v_BNC, windows, None)[:, num_prefix:], grid, self.num_heads)
            if windows is not None:
                local = local[:, windows.order[num_prefix:] - num_prefix]
            if torch.is_grad_enabled():
                out = out + F.pad(local, (0, 0, num_prefix, 0))
            else:  # in place: saves a pass over the map; with gradients the kernel still needs its output unchanged
                out[:, num_prefix:] += local
        return self.proj_drop(self.proj(out))

    def attend_in_windows(self, x_BNC: Tensor, grid: Grid, window: Grid) -> Tensor:
        """(B, h·w, C) → the same. The zeros that fill up the last windows of a row or a column are keys like all others
        (ViTDet); the local term sees the whole map, without them."""
        qkv_BnNC = self.qkv(partition(x_BNC.unflatten(1, grid), window))
        dropout = self.attn_drop if self.training else 0.0
        out = merge(window_attention(qkv_BnNC, self.num_heads, dropout=dropout), grid, window).flatten(1, 2)
        if self.local is not None:
            v_BNC = merge(qkv_BnNC.chunk(3, dim=-1)[2], grid, window).flatten(1, 2)
            out = out + self.local(v_BNC, grid, self.num_heads)
        return self.proj_drop(self.proj(out))


class Block(nn.Module):
    """Pre-norm transformer block: x ← x + DropPath(Attn(LN(x))); x ← x + DropPath(MLP(LN(x))) (ViT, equations 2 and
    3).

    Works on tokens (B, N, C) and on maps (B, H, W, C): the shape is the attention's business. An attention that returns
    only the first rows of what it was given makes the block return only these.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float = 0.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp
        # Two modules: the branches of a block are dropped by separate draws.
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """`context`: what the attention takes besides the tokens."""
        y = self.drop_path1(self.attn(self.norm1(x), *context))
        x = add(x[:, : y.shape[1]], y)
        return add(x, self.drop_path2(self.mlp(self.norm2(x))))


def add(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch. Without gradients the sum is written over `branch`, which must be a tensor of its own: one map less
    to allocate."""
    if torch.is_grad_enabled() or branch.dtype != x.dtype:
        return x + branch
    return branch.add_(x)
