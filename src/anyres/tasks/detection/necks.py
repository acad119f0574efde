"""Necks of detectors: from the feature maps of a backbone to pyramid levels of equal width with doubling strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

LEVELS = 5
"""Number of levels of every neck."""
NORMS: dict[str, Any] = {"none": None, "batch": nn.BatchNorm2d, "layer": LayerNorm2d}
"""Norms of necks and heads, by name. LayerNorm is over channels, with eps 1e-6."""


class CoarseLevels(ExtraFPNBlock):
    """Additional coarse levels from 3x3 convolutions with stride 2, with a ReLU between them (RetinaNet, section 4).

    The input is the backbone's last map or, with `from_pyramid`, the last level of the pyramid.
    """

    def __init__(self, in_channels: int, channels: int, count: int, from_pyramid: bool) -> None:
        super().__init__()
        self.from_pyramid = from_pyramid
        self.convs = nn.ModuleList(nn.Conv2d(channels if i else in_channels, channels, 3, 2, 1) for i in range(count))
        for conv in self.convs:
            nn.init.kaiming_uniform_(conv.get_parameter("weight"), a=1)
            nn.init.zeros_(conv.get_parameter("bias"))

    def forward(self, levels: list[Tensor], maps: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        x = levels[-1] if self.from_pyramid else maps[-1]
        for i, conv in enumerate(self.convs):
            x = conv(x.relu() if i else x)
            levels, names = [*levels, x], [*names, f"coarse{i}"]
        return levels, names


class FeaturePyramid(FeaturePyramidNetwork):
    """FPN (Lin et al., CVPR 2017) on maps with strides that double, starting at `finest`.

    It consists of 1x1 convolutions, top-down sums, 3x3 convolutions and the additional levels of `extra`. Coarser maps
    are resized to the actual size of the finer ones, so odd sizes need no padding.
    """

    def __init__(self, widths: Sequence[int], finest: int, channels: int, norm: str, extra: ExtraFPNBlock) -> None:
        super().__init__(list(widths), channels, extra, NORMS[norm])
        self.strides = tuple(finest * 2**i for i in range(LEVELS))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_i, h_i, w_i), fine to coarse → levels (B, channels, h, w). Surplus finer maps are not used."""
        inner = maps[-len(self.inner_blocks) :]
        return list(super().forward({str(i): x for i, x in enumerate(inner)}).values())


class SimplePyramid(nn.Module):
    """Simple feature pyramid from the last map of a plain backbone (ViTDet, section 3; ResFormer's detector).

    From fine to coarse, the levels are the map upsampled by `doublings` to one transposed convolutions of full width,
    the map itself, and the map halved by max pooling. Each passes through a 1x1 and a 3x3 convolution with LayerNorm.
    There are no sums between levels. The additional levels of `extra` follow.
    """

    def __init__(self, dim: int, stride: int, doublings: int, channels: int, extra: ExtraFPNBlock) -> None:
        super().__init__()
        self.strides = tuple(stride * 2.0 ** (i - doublings) for i in range(LEVELS))
        levels = []
        for times in range(doublings, -2, -1):
            resize: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)] if times < 0 else []
            for i in range(times):
                resize += [*([LayerNorm2d(dim), nn.GELU()] if i else []), nn.ConvTranspose2d(dim, dim, 2, 2)]
            convs = (
                Conv2dNormActivation(dim, channels, 1, norm_layer=LayerNorm2d, activation_layer=None),
                Conv2dNormActivation(channels, channels, 3, norm_layer=LayerNorm2d, activation_layer=None),
            )
            levels.append(nn.Sequential(*resize, *convs))
        self.levels = nn.ModuleList(levels)
        self.extra = extra

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps, only the last of which (B, dim, h, w) is used → levels (B, channels, h_i, w_i)."""
        levels, _ = self.extra([level(maps[-1]) for level in self.levels], [maps[-1]], [])
        return levels
