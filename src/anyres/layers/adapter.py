"""The deformable adapter that gives a plain transformer of stride 8 a pyramid of feature maps.

See ViT-Adapter; GPViT uses it for detection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.layers.deformable import DeformableAttention, cell_centres
from anyres.layers.init import init_linear_and_convolution
from anyres.layers.maps import ConvMlp, ConvNorm, on_map, to_map, to_nchw
from anyres.shapes import Grid

HEADS = 6
"""Number of heads of every deformable attention."""


class SpatialPrior(nn.Module):
    """Convolutions from the image to maps of strides 4, 8, 16, 32 with equal width (ViT-Adapter, section 3.3)."""

    def __init__(self, in_chans: int, dim: int, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.ModuleList(ConvNorm(width if i else in_chans, width, 3, 1 if i else 2) for i in range(3))
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.convs = nn.ModuleList(ConvNorm(widths[i], widths[i + 1], 3, 2) for i in range(3))
        self.fc = nn.ModuleList(nn.Linear(channels, dim) for channels in widths)

    def forward(self, x_BHWC: Tensor) -> list[Tensor]:
        for conv in self.stem:
            x_BHWC = conv(x_BHWC).relu()
        x_BHWC = to_map(F.max_pool2d(to_nchw(x_BHWC), 3, 2, 1))
        maps = [x_BHWC]
        for conv in self.convs:
            maps.append(conv(maps[-1]).relu())
        return [fc(map_) for fc, map_ in zip(self.fc, maps, strict=True)]


class Injector(nn.Module):
    """x ← x + γ · MSDA(LN(x), LN(c)): tokens read from the pyramid (ViT-Adapter, equation 1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, HEADS, levels=3)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x_BNC: Tensor, grid: Grid, c_BMC: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        places = cell_centres((grid,), x_BNC.device)
        return x_BNC + self.gamma * self.attn(self.query_norm(x_BNC), places, self.feat_norm(c_BMC), grids)


class Extractor(nn.Module):
    """c ← c + MSDA(LN(c), LN(x)); c ← c + FFN(LN(c)): the pyramid reads from the tokens (ViT-Adapter, equations 2, 3).

    The FFN's depthwise convolution is applied to each level separately.
    """

    def __init__(self, dim: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, HEADS, levels=1)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = ConvMlp(dim, dim // 4)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x_BNC: Tensor, grid: Grid, c_BMC: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        places = cell_centres(grids, c_BMC.device)
        c_BMC = c_BMC + self.attn(self.query_norm(c_BMC), places, self.feat_norm(x_BNC), (grid,))
        levels = self.ffn_norm(c_BMC).split([h * w for h, w in grids], dim=1)
        y = [self.ffn(level.unflatten(1, size)).flatten(1, 2) for level, size in zip(levels, grids, strict=True)]
        return c_BMC + self.drop_path(torch.cat(y, dim=1))


class Interaction(nn.Module):
    """The injector before, and the extractors after, one part of the backbone's blocks."""

    def __init__(self, dim: int, drop_path: float, extractors: int) -> None:
        super().__init__()
        self.injector = Injector(dim)
        self.extractors = nn.ModuleList(Extractor(dim, drop_path) for _ in range(extractors))


class Adapter(nn.Module):
    """A spatial prior next to the backbone, four interactions with it, and four maps of strides 4, 8, 16, 32.

    See ViT-Adapter, figure 4, here at stride 8. The last interaction has two additional extractors. `finest` 8 leaves
    out the first map and everything needed only for it.
    """

    def __init__(self, in_chans: int, dim: int, drop_path: float, interactions: int, finest: int = 4) -> None:
        super().__init__()
        self.prior = SpatialPrior(in_chans, dim)
        self.level_embed = nn.Parameter(torch.randn(3, dim))
        self.interactions = nn.ModuleList(
            Interaction(dim, drop_path, 3 if i == interactions - 1 else 1) for i in range(interactions)
        )
        self.up: nn.Module = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in range(4))
        self.apply(init_linear_and_convolution)
        nn.init.normal_(self.up.weight, std=math.sqrt(2 / (4 * dim)))
        self.finest = finest
        if finest == 8:
            self.prior.fc[0] = self.up = self.norms[0] = nn.Identity()
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()

    def forward(
        self, x_BHWC: Tensor, tokens: Tensor, grid: Grid, trunk: Sequence[Callable[[Tensor], Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the backbone's parts (tokens → tokens) with the adapter.

        Takes the image as a map with sides that are multiples of 32, and the embedded tokens. Returns the backbone's
        tokens and the maps (B, h, w, C).
        """
        c1, *maps = self.prior(x_BHWC)
        grids = tuple((c.shape[1], c.shape[2]) for c in maps)
        c = torch.cat([c.flatten(1, 2) + level for c, level in zip(maps, self.level_embed, strict=True)], dim=1)
        for interaction, part in zip(self.interactions, trunk, strict=True):
            assert isinstance(interaction, Interaction)
            tokens = part(interaction.injector(tokens, grid, c, grids))
            for extractor in interaction.extractors:
                c = extractor(tokens, grid, c, grids)
        levels = c.split([h * w for h, w in grids], dim=1)
        maps = [level.unflatten(1, size) for level, size in zip(levels, grids, strict=True)]
        if self.finest == 4:
            maps = [on_map(self.up, maps[0]) + c1, *maps]
        last = to_nchw(tokens.unflatten(1, grid))
        out = []
        for map_, norm, scale in zip(maps[::-1], self.norms[::-1], (0.25, 0.5, 1.0, 2.0), strict=False):
            resized = last if scale == 1 else F.interpolate(last, scale_factor=scale, mode="bilinear")
            out.append(to_map(norm(to_nchw(map_) + resized)))
        return tokens, out[::-1]
