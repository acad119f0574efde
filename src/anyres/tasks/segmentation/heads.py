"""Heads for semantic segmentation: feature maps of a backbone, finest first → class logits at the size of the first.

The maps may have any size. A coarser map is resized to the actual size of a finer one, so that odd sizes need no
padding; maps of equal size (plain models) are not resized. Widths, norms and dropout follow the papers' configurations
for ADE20K. Convolutions that are followed by a norm have no bias.

Sources: Semantic FPN, "Panoptic Feature Pyramid Networks", CVPR 2019, arXiv 1901.02446; UPerNet, "Unified Perceptual
Parsing for Scene Understanding", ECCV 2018, arXiv 1807.10221; SegFormer, NeurIPS 2021, arXiv 2105.15203.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

from anyres.errors import UserError
from anyres.layers.init import init_linear_and_convolution
from anyres.layers.maps import to_map, to_nchw
from anyres.layers.resample import average_map
from anyres.layers.sizes import same

BINS = (1, 2, 3, 6)
"""Grid sides of UPerNet's pyramid pooling of the last map."""


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (B, C, h, w) to (B, C, *size), bilinearly with half-pixel centres; return it as is if the size matches."""
    if same((x.shape[-2], x.shape[-1]), (size[0], size[1])):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def classifier(dim: int, num_classes: int) -> nn.Sequential:
    """Return channel dropout (0.1) and a 1x1 convolution to the classes, initialised from a normal with std 0.01."""
    conv = nn.Conv2d(dim, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Dropout2d(0.1), conv)


class SemanticFPN(nn.Module):
    """Semantic FPN: a feature pyramid whose levels are upsampled to the size of the first one and summed.

    Each doubling of the resolution is a 3x3 convolution with norm and ReLU followed by a bilinear resize.

    Args:
        info: `feature_info` of the maps (their num_chs and reduction).
        channels: width of the pyramid (published: 256); the upsampling path has half of it.
    """

    def __init__(self, info: Sequence[dict[str, Any]], num_classes: int, channels: int = 256) -> None:
        super().__init__()
        strides = [level["reduction"] for level in info]
        self.fpn = FeaturePyramidNetwork([level["num_chs"] for level in info], channels)
        # For each level, the finer levels whose sizes it passes through; a level with the first one's stride has one.
        self.paths = [
            [j for j in range(i - 1, -1, -1) if strides[j] < strides[j + 1]] or [0] for i in range(len(strides))
        ]
        dim = channels // 2
        self.towers = nn.ModuleList(
            nn.ModuleList(Conv2dNormActivation(dim if step else channels, dim) for step in range(len(path)))
            for path in self.paths
        )
        self.towers.apply(init_linear_and_convolution)
        self.classify = classifier(dim, num_classes)

    def climb(self, x: Tensor, level: int, maps: Sequence[Tensor]) -> Tensor:
        """Upsample a level of the pyramid to the size of the first map."""
        tower: Any = self.towers[level]
        for conv, finer in zip(tower, self.paths[level], strict=True):
            x = resize(conv(x), maps[finer].shape[-2:])
        return x

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = self.fpn({str(i): map_ for i, map_ in enumerate(maps)}).values()
        return self.classify(reduce(torch.add, (self.climb(x, i, maps) for i, x in enumerate(levels))))


class UPerNet(nn.Module):
    """UPerNet: pyramid pooling of the last map, a top-down path, and a 3x3 convolution that fuses all levels.

    The levels are fused at the size of the first one. Norm and ReLU follow every convolution. Training on a single
    image raises UserError, because the norm of the 1x1 pooled map needs two images or `nn.SyncBatchNorm`.

    Args:
        info: `feature_info` of the maps.
        channels: width of all convolutions (published: 512).
    """

    def __init__(self, info: Sequence[dict[str, Any]], num_classes: int, channels: int = 512) -> None:
        super().__init__()
        *finer, last = [level["num_chs"] for level in info]
        self.pooled = nn.ModuleList(Conv2dNormActivation(last, channels, 1) for _ in BINS)
        self.top = Conv2dNormActivation(last + len(BINS) * channels, channels)
        self.laterals = nn.ModuleList(Conv2dNormActivation(dim, channels, 1) for dim in finer)
        self.smooth = nn.ModuleList(Conv2dNormActivation(channels, channels) for _ in finer)
        self.fuse = Conv2dNormActivation(len(info) * channels, channels)
        self.apply(init_linear_and_convolution)
        self.classify = classifier(channels, num_classes)

    def pool(self, last: Tensor) -> Tensor:
        """Fuse the last map with its averages over `BINS`: (B, C, h, w) → (B, channels, h, w)."""
        norm = self.pooled[0][1]  # type: ignore[index]
        if type(norm) is nn.BatchNorm2d and norm.training and len(last) == 1:
            raise UserError(
                "UPerNet trains on a batch of 1 image, but its norm of the 1x1 pooled map needs at least 2 values: "
                "give each device 2 images or synchronise batch norms over several devices."
            )
        size = last.shape[-2:]
        means = [
            # A map made from one pixel loses the channels-last layout, and the concatenation would lose it as well.
            resize(conv(to_nchw(average_map(to_map(last), (side, side)))), size).contiguous(
                memory_format=torch.channels_last
            )
            for conv, side in zip(self.pooled, BINS, strict=True)
        ]
        return self.top(torch.cat([last, *means], 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *finer, last = maps
        x = self.pool(last)
        levels = [x]
        for map_, lateral, smooth in zip(finer[::-1], self.laterals[::-1], self.smooth[::-1], strict=True):
            x = lateral(map_) + resize(x, map_.shape[-2:])
            levels.append(smooth(x))
        size = maps[0].shape[-2:]
        return self.classify(self.fuse(torch.cat([resize(level, size) for level in levels[::-1]], 1)))


class SegFormerHead(nn.Module):
    """SegFormer's head: a linear layer on every map, then a 1x1 convolution with norm and ReLU over all of them.

    The maps are resized to the size of the first one and concatenated before that convolution.

    Args:
        info: `feature_info` of the maps.
        channels: width of all layers (published: 256).
    """

    def __init__(self, info: Sequence[dict[str, Any]], num_classes: int, channels: int = 256) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Conv2d(level["num_chs"], channels, 1) for level in info)
        self.fuse = nn.Conv2d(len(info) * channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.apply(init_linear_and_convolution)
        self.classify = classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[-2:]
        levels = [resize(linear(map_), size) for map_, linear in zip(maps, self.linears, strict=True)]
        return self.classify(self.norm(self.fuse(torch.cat(levels, 1))).relu())


HEADS: dict[str, tuple[type[nn.Module], int]] = {
    "upernet": (UPerNet, 512),
    "semantic_fpn": (SemanticFPN, 256),
    "segformer": (SegFormerHead, 256),
}
"""Heads with their published widths, by name."""
