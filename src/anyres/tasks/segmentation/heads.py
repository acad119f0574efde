"""Decoders of semantic segmentation: the maps of a backbone, finest first → class logits at the size of the first.

Maps may have any sizes. A coarser one is brought to the actual size of a finer, so that odd sides need no padding, and
maps of equal size (plain models) are left as they are. Widths, norms and dropout are those of the papers'
configurations for ADE20K; every convolution that a norm follows has no bias.

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

BINS = (1, 2, 3, 6)
"""Sides of the grids to which UPerNet's pyramid pooling averages the last map."""


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) → (B, C, *size), bilinear with half-pixel centres; untouched if it has that size."""
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def classifier(dim: int, num_classes: int) -> nn.Sequential:
    """Dropout of whole channels (0.1), then a 1x1 convolution to the classes, whose start is normal 0.01."""
    conv = nn.Conv2d(dim, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Dropout2d(0.1), conv)


class SemanticFPN(nn.Module):
    """A feature pyramid whose levels go up to the first level's size, by a 3x3 convolution with norm and ReLU and a
    bilinear resize for each halving on the way, and are summed.

    Args:
        info: `feature_info` of the maps (their num_chs and reduction).
        channels: width of the pyramid (published: 256); levels go up in half of it.
    """

    def __init__(self, info: Sequence[dict[str, Any]], num_classes: int, channels: int = 256) -> None:
        super().__init__()
        strides = [level["reduction"] for level in info]
        self.fpn = FeaturePyramidNetwork([level["num_chs"] for level in info], channels)
        # For each level the finer ones whose sizes it goes through; a level of the first one's stride has one step.
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
        """A level of the pyramid up to the first map's size."""
        tower: Any = self.towers[level]
        for conv, finer in zip(tower, self.paths[level], strict=True):
            x = resize(conv(x), maps[finer].shape[-2:])
        return x

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = self.fpn({str(i): map_ for i, map_ in enumerate(maps)}).values()
        return self.classify(reduce(torch.add, (self.climb(x, i, maps) for i, x in enumerate(levels))))


class UPerNet(nn.Module):
    """Pyramid pooling on the last map, a top-down pyramid of the others, and a 3x3 convolution over all levels at the
    first one's size; norm and ReLU follow every convolution.

    Args:
        info: `feature_info` of the maps.
        channels: width of all convolutions (published: 512).

    Training on one image raises UserError: the norm of the 1x1 pooled map needs two, or `nn.SyncBatchNorm`.
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
        """The last map beside its averages over `BINS`: (B, C, h, w) → (B, channels, h, w)."""
        norm = self.pooled[0][1]  # type: ignore[index]
        if type(norm) is nn.BatchNorm2d and norm.training and len(last) == 1:
            raise UserError(
                "UPerNet trains on a batch of 1 image, but its norm of the 1x1 pooled map needs at least 2 values: "
                "give each device 2 images or synchronise batch norms over several devices."
            )
        size = last.shape[-2:]
        means = [
            # What comes from one pixel has lost the maps' layout, and the concatenation would lose it with it.
            resize(conv(F.adaptive_avg_pool2d(last, side)), size).contiguous(memory_format=torch.channels_last)
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
    """A linear layer on every map, all levels beside each other at the first one's size, a 1x1 convolution over them
    with norm and ReLU.

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
"""Heads by name, with their published widths."""
