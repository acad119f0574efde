"""Convolutions and batch norms of channels-last maps.

Maps between the blocks of a pyramid are (B, H, W, C). Such a tensor seen as (B, C, H, W) is a channels-last tensor in
torch's sense, so a convolution takes it and returns one like it without a copy.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def to_map(x_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H, W, C), contiguous; a clip (B, C, T, H, W) → (B, T, H, W, C)."""
    return x_BCHW.movedim(1, -1).contiguous()


def to_nchw(x_BHWC: Tensor) -> Tensor:
    """(B, H, W, C) → (B, C, H, W), a view; (B, T, H, W, C) → (B, C, T, H, W)."""
    return x_BHWC.movedim(-1, 1)


class MapConv(nn.Conv2d):
    """A convolution of channels-last maps: (B, H, W, C) → (B, h, w, C')."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        # The kernels keep channels-last layout except where they cannot tell (one channel, one pixel): then they copy.
        return super().forward(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the output for an input of this size."""
        sides = []
        for axis, side in enumerate((height, width)):
            padding = self.padding[axis] if not isinstance(self.padding, str) else self.kernel_size[axis] // 2
            sides.append((side + 2 * int(padding) - self.kernel_size[axis]) // self.stride[axis] + 1)
        return sides[0], sides[1]


class DepthwiseConv(MapConv):
    """One k×k filter per channel, stride 1 unless given, same size out."""

    def __init__(self, dim: int, kernel: int = 3, stride: int = 1, bias: bool = True) -> None:
        super().__init__(dim, dim, kernel, stride, kernel // 2, groups=dim, bias=bias)


class ResidualDepthwiseConv(DepthwiseConv):
    """x + depthwise(x), stride 1: the conditional position encoding of CPVT (Twins, ScalableViT, RegionViT, MPViT), the
    local perception unit of CMT and DAT++, and the enhancement inside several feed-forward networks.

    Without gradients the identity is added to the filters' centre tap, which spares a pass over the map.
    """

    def forward(self, x_BHWC: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return x_BHWC + super().forward(x_BHWC)
        centre = self.kernel_size[0] // 2
        weight = self.weight.clone()
        weight[:, 0, centre, centre] += 1
        x = F.conv2d(x_BHWC.permute(0, 3, 1, 2), weight, self.bias, padding=centre, groups=self.groups)
        return x.permute(0, 2, 3, 1).contiguous()


class MapBatchNorm(nn.BatchNorm2d):
    """Batch norm of channels-last maps."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return super().forward(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MapSyncBatchNorm(nn.SyncBatchNorm):
    """`MapBatchNorm` with the statistics of all processes' images."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return super().forward(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


Module = TypeVar("Module", bound=nn.Module)


def sync_batch_norms(module: Module) -> Module:
    """Replace every batch norm of a model by one that shares its statistics among processes (GPUs only). torch's own
    conversion would lose the layout of `MapBatchNorm`."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            kind = MapSyncBatchNorm if isinstance(child, MapBatchNorm) else nn.SyncBatchNorm
            new = kind(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            new.load_state_dict(child.state_dict())
            setattr(module, name, new.to(child.weight.device))
        else:
            sync_batch_norms(child)
    return module


class ConvNorm(nn.Module):
    """Convolution, then batch norm: (B, H, W, C) → (B, h, w, C'). `fold` makes them one convolution for inference.

    The convolution has no bias of its own unless `bias`; arguments as of `torch.nn.Conv2d`.
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
        self.conv = MapConv(in_dim, dim, kernel, stride, padding, groups=groups, bias=bias)
        self.norm: nn.Module = MapBatchNorm(dim, eps=eps)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.conv.grid(height, width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.norm(self.conv(x_BHWC))

    def fold(self) -> None:
        """Fold the norm's running statistics into the convolution; exact up to rounding, and only for evaluation."""
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_into(self.conv, self.norm)
            self.norm = nn.Identity()


@torch.no_grad()
def fold_into(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d) -> None:
    """Multiply the batch norm that follows `layer` into its weight and bias. The caller drops the norm."""
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

    PVT v2, Shunted, P2T, HAT-Net and DAT++ differ in three choices: `act1` after the first linear layer (none if
    None), the activation after the convolution, and whether the convolution is `residual` (h + depthwise(h)).
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
        conv: Any = ResidualDepthwiseConv if residual else DepthwiseConv
        self.fc1 = nn.Linear(dim, hidden, bias)
        self.act1 = nn.Identity() if act1 is None else act1()
        self.dwconv = conv(hidden, kernel, bias=bias)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim, bias)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.act1(self.fc1(x_BHWC)))))
