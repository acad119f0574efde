"""Convolutions and batch norms on channels-last maps.

Maps between the blocks of a pyramid are (B, H, W, C). Viewed as (B, C, H, W), such a tensor has torch's channels-last
memory format, so convolutions take it and return the same format without a copy. The modules are torch's own and keep
their (B, C, H, W) interface, so anything that replaces or wraps them (LoRA, quantisation, synchronised norms) works as
usual.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.errors import UserError
from anyres.layers.sizes import is_below, known, missing


def to_map(x_BCHW: Tensor) -> Tensor:
    """Convert (B, C, H, W) to (B, H, W, C), contiguous, or a clip (B, C, T, H, W) to (B, T, H, W, C)."""
    return x_BCHW.movedim(1, -1).contiguous()


def to_nchw(x_BHWC: Tensor) -> Tensor:
    """View (B, H, W, C) as (B, C, H, W), or (B, T, H, W, C) as (B, C, T, H, W)."""
    return x_BHWC.movedim(-1, 1)


def on_map(module: nn.Module, x_BHWC: Tensor) -> Tensor:
    """Apply an image module, such as a convolution or batch norm: (B, H, W, C) → (B, h, w, C'), contiguous."""
    # Kernels keep the channels-last layout unless it is ambiguous (one channel, one pixel); then this copies.
    return to_map(module(to_nchw(x_BHWC)))


def by_group(x_BHWC: Tensor, groups: int) -> Tensor:
    """Move groups of channels (heads) to the batch: (B, H, W, groups·c) → (B·groups, H, W, c), contiguous.

    This lets one module process all groups with the same weights.
    """
    return x_BHWC.unflatten(3, (groups, -1)).movedim(3, 1).flatten(0, 1).contiguous()


def from_groups(x_BHWc: Tensor, groups: int) -> Tensor:
    """The inverse of `by_group`."""
    return x_BHWc.unflatten(0, (-1, groups)).movedim(1, 3).flatten(3)


def depthwise(dim: int, kernel: int = 3, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """Return a convolution with one k×k filter per channel, size-preserving at stride 1. Raises UserError for an even
    k."""
    if kernel % 2 == 0:
        raise UserError(f"A filter of {kernel}x{kernel} has no centre: choose an odd side, such as {kernel + 1}.")
    return nn.Conv2d(dim, dim, kernel, stride, kernel // 2, groups=dim, bias=bias)


def with_residual(conv: nn.Module, x_BHWC: Tensor) -> Tensor:
    """Return x + conv(x).

    With a depthwise convolution, this is CPVT's conditional position encoding (Twins, ScalableViT, RegionViT, MPViT),
    the local perception unit of CMT and DAT++, and the local enhancement in several feed-forward networks.
    """
    return x_BHWC + on_map(conv, x_BHWC)


def conv_grid(conv: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    """Return the output size (h, w) of a convolution for an input of this size."""
    sides = []
    for axis, side in enumerate((height, width)):
        padding = int(conv.padding[axis])
        sides.append((side + 2 * padding - conv.kernel_size[axis]) // conv.stride[axis] + 1)
    return sides[0], sides[1]


def pad_below(x: Tensor, rows: int, columns: int, axis: int = 1) -> Tensor:
    """Zero-pad rows at the bottom and columns at the right, where `axis` is that of the rows; none gives the same
    tensor."""
    if known(rows == 0) and known(columns == 0):
        return x
    return F.pad(x, (0, 0) * (x.ndim - axis - 2) + (0, columns, 0, rows))


def pad_to_multiple(x: Tensor, multiple: int, axis: int = 1) -> Tensor:
    """Zero-pad a map (B, H, W, C), or with `axis` 2 an image (B, C, H, W), at the bottom and right to a multiple."""
    return pad_below(x, missing(x.shape[axis], multiple), missing(x.shape[axis + 1], multiple), axis)


def pad_to_cell(x_BHWC: Tensor, cell: int) -> Tensor:
    """Zero-pad a map with sides below `cell`, so that a convolution with kernel = stride = `cell` gives one cell.

    What exceeds whole cells is not read, so the amount may be the same for every side below.
    """
    rows, columns = ((cell - 1) * is_below(side, cell) for side in x_BHWC.shape[1:3])
    return pad_below(x_BHWC, rows, columns)


class ConvNorm(nn.Module):
    """A convolution followed by a batch norm: (B, H, W, C) → (B, h, w, C').

    `fold` fuses them into a single convolution for inference. Arguments are those of `torch.nn.Conv2d`, except that the
    convolution has no bias unless `bias`.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_dim, dim, kernel, stride, padding, groups=groups, bias=bias)
        self.norm: nn.Module = nn.BatchNorm2d(dim, eps=eps)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return to_map(self.norm(self.conv(to_nchw(x_BHWC))))

    def fold(self) -> None:
        """Fuse the batch norm's statistics into the convolution; exact up to rounding, and for evaluation only."""
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_into(self.conv, self.norm)
            self.norm = nn.Identity()


@torch.no_grad()
def fold_into(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d) -> None:
    """Fuse a batch norm into the weight and bias of the `layer` before it. The caller removes the norm."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = norm.bias - norm.running_mean * scale
    if layer.bias is not None:
        bias = bias + layer.bias * scale
    shape = (-1,) + (1,) * (layer.weight.ndim - 1)
    layer.weight = nn.Parameter(layer.weight * scale.view(shape))
    layer.bias = nn.Parameter(bias)


class ConvMlp(nn.Module):
    """Feed-forward network with a depthwise convolution on its hidden map: fc1 → [act] → depthwise → act → fc2.

    PVT v2, Shunted, P2T, HAT-Net and DAT++ differ in three choices: `act1` after the first linear layer (may be None),
    the activation after the convolution, and whether the convolution is `residual` (h + depthwise(h)).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        act: type[nn.Module] = nn.GELU,
        act1: type[nn.Module] | None = None,
        residual: bool = False,
        kernel: int = 3,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.convolve = with_residual if residual else on_map
        self.fc1 = nn.Linear(dim, hidden, bias)
        self.act1 = nn.Identity() if act1 is None else act1()
        self.dwconv = depthwise(hidden, kernel, bias=bias)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim, bias)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.fc2(self.act(self.convolve(self.dwconv, self.act1(self.fc1(x_BHWC)))))
