"""Attention within full-length stripes of a map, with positions from a depthwise convolution of the values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.errors import UserError
from anyres.layers.maps import depthwise, on_map
from anyres.layers.sizes import known, missing, narrow, regroup


class StripeAttention(nn.Module):
    """Cross-shaped window attention (CSWin, section 3.1; GPViT's local attention) on a map (B, H, W, C).

    The first half of the heads attends within vertical stripes (full height, `width` columns), and the second half
    within horizontal ones. With `width` None all heads attend over the whole map. LePE (CSWin, equation 7) is added to
    each stripe's result: a depthwise 3x3 convolution of the stripe's values, zero-padded as if it were an image of its
    own.

    `ghosts` controls sides that are not a multiple of the width. False makes the last stripe narrower. True follows
    CSWin's dense code: zero lines are added before the first stripe and after the last, half on each side (the odd one
    at the end). They are added after the linear layer and without a mask, so each is a key with logit 0 and value 0.
    """

    def __init__(self, dim: int, num_heads: int, width: int | None, ghosts: bool = False) -> None:
        super().__init__()
        branches = 1 if width is None else 2
        if num_heads % branches or dim % num_heads:
            raise UserError(
                f"A width of {dim} in {num_heads} heads cannot be split into {branches} branches of heads: choose "
                f"heads that are a multiple of {branches} and a width that is a multiple of the heads."
            )
        self.branch_heads = num_heads // branches
        self.width = width
        self.ghosts = ghosts
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = nn.ModuleList(depthwise(dim // branches) for _ in range(branches))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        qkv = self.qkv(x_BHWC).unflatten(-1, (3, len(self.lepe), -1))
        if self.width is None:
            return self.proj(self._attend(qkv[..., 0, :], 1, x_BHWC.shape[1], 0))
        branches = [self._branch(qkv[..., 0, :], 2, 0), self._branch(qkv[..., 1, :], 1, 1)]
        return self.proj(torch.cat(branches, dim=-1))

    def _branch(self, qkv_BHW3c: Tensor, axis: int, branch: int) -> Tensor:
        """Attend within stripes cut along `axis` (1: horizontal, 2: vertical): (B, H, W, 3, c) → (B, H, W, c)."""
        assert self.width is not None
        side = qkv_BHW3c.shape[axis]
        extra = missing(side, self.width)
        if known(extra == 0):
            return self._attend(qkv_BHW3c, axis, self.width, branch)
        before = extra // 2 if self.ghosts else 0
        if self.ghosts or torch.compiler.is_compiling():
            lines = (before, extra - before) if axis == 2 else (0, 0, before, extra - before)
            padded = F.pad(qkv_BHW3c, (0, 0, 0, 0, *lines))
            real = None
            if not self.ghosts:
                real = torch.arange(side + extra, device=padded.device).unflatten(0, (-1, self.width)) < side
            return narrow(self._attend(padded, axis, self.width, branch, real), axis, before, side)
        rest = self.width - extra
        if rest == side:
            return self._attend(qkv_BHW3c, axis, rest, branch)
        whole, last = qkv_BHW3c.split((side - rest, rest), axis)
        parts = [self._attend(whole, axis, self.width, branch), self._attend(last, axis, rest, branch)]
        return torch.cat(parts, dim=axis)

    def _attend(self, qkv_BHW3c: Tensor, axis: int, width: int, branch: int, real_nw: Tensor | None = None) -> Tensor:
        """Apply softmax attention and LePE within each stripe; `width` must divide the side.

        `real_nw` is true for the lines of the stripes that provide keys; by default all do.
        """
        cut = qkv_BHW3c.unflatten(axis, (-1, width))
        if axis == 2:
            cut = cut.transpose(1, 2)
        B, n, h, w = cut.shape[:4]
        tokens = regroup(cut, B * n, h * w, 3, cut.shape[-1])  # horizontal stripes are a view
        q, k, v = tokens.unflatten(-1, (self.branch_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None
        if real_nw is not None:
            lines = real_nw[:, :, None] if axis == 1 else real_nw[:, None]
            mask = lines.expand(B, n, h, w).reshape(B * n, 1, 1, h * w)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2).unflatten(1, (h, w))
        out = (out + on_map(self.lepe[branch], tokens[:, :, 2].unflatten(1, (h, w)))).unflatten(0, (B, n))
        return regroup(out.transpose(1, 2) if axis == 2 else out, *qkv_BHW3c.shape[:3], out.shape[-1])
