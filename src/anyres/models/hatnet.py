"""HAT-Net: a pyramid with the layout of a CNN that attends first inside small windows, then to a pooled map.

Four stages at strides 4, 8, 16, 32, without class tokens, position tables or biases: positions come only from the zero
padding of depthwise convolutions. In the first three stages, attention runs inside windows, and every position of the
result then attends to an average-pooled copy of it (hierarchical attention); the last stage has plain attention. All
norms are group norms with one group: mean and variance over the whole map of an image.

Paper: "Vision Transformers with Hierarchical Attention", Liu, Wu, Sun, Zhang, Chhatkuli, Van Gool, Machine Intelligence
Research 21, 2024, arXiv 2106.03180. Published code and weights: yun-liu/HAT-Net (no licence stated).

Any input size: the published code needs maps that the windows (`grid_sizes`) divide, that is sides of 221 to 224 or
other multiples of 224. Here q, k and v are zero-padded at the right and the bottom to whole windows, padded keys are
masked, and the padding is removed before the next norm; incomplete pooling cells at the border average the positions
that exist. The published pooling drops rows and columns that do not fill a cell: `remainder="truncate"`. No weight
depends on `grid_sizes`, so they can be chosen for a size (8, 4, 2, 1 for multiples of 32), but results then differ.

Quirks that checkpoints depend on: norms have eps 1e-6; there is no norm before the head; published files contain an
unused norm `proj_norm` in every attention. Because the norms cover the whole map, padding an image to fit a batch
changes its features.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.layers.maps import ConvMlp, conv_grid, on_map, pad_to_multiple, to_map, to_nchw
from anyres.layers.parts import parts_of
from anyres.layers.patch_embed import ConvEmbed, Remainder
from anyres.layers.spatial_reduction import attend
from anyres.layers.windows import merge, partition, window_attention, window_padding
from anyres.models._backbone import Family, Variant
from anyres.models._keys import KeyRule
from anyres.models._pyramid import Pyramid, Stage, drop_path_rates
from anyres.options import Count, Depth, Factor, PerStage, Rate
from anyres.shapes import Grid


class ImageNorm(nn.GroupNorm):
    """Normalise the map of each image to mean 0 and variance 1 over all channels; then scale and shift per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__(1, dim, eps=1e-6)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return super().forward(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2 with a norm and SiLU between them: the image → a map of stride 4."""

    def __init__(self, in_chans: int, dim: int, hidden: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, hidden, 3, 2, 1)
        self.norm1 = ImageNorm(hidden)
        self.conv2 = nn.Conv2d(hidden, dim, 3, 2, 1)

    def grid(self, height: int, width: int) -> Grid:
        return conv_grid(self.conv2, *conv_grid(self.conv1, height, width))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return on_map(self.conv2, F.silu(self.norm1(on_map(self.conv1, x_BHWC))))


class Downsample(ConvEmbed):
    """Downsampling between stages: a 3x3 convolution of stride 2, then a norm."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(in_dim, dim, 3, 2, 1, eps=None)
        self.norm = ImageNorm(dim)


class PlainAttention(nn.Module):
    """Norm → attention over the whole map → projection."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, dim // head_dim)
        self.norm = ImageNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_norm = ImageNorm(dim).requires_grad_(False)  # unused; published files contain it

    def forward(self, x_BHWC: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x_BHWC)).flatten(1, 2).chunk(3, dim=-1)
        return self.proj(attend(q, k, v, self.num_heads)).view(x_BHWC.shape)


class HierarchicalAttention(PlainAttention):
    """H-MSA (section 3.2): attention inside windows, then attention to a pooled map.

    The attention inside windows of `window` x `window` positions is added to the input and normed. Each position of the
    result z then attends to z pooled by `pool`; z is added, and the sum is projected.
    """

    def __init__(self, dim: int, head_dim: int, window: int, pool: int, remainder: Remainder) -> None:
        super().__init__(dim, head_dim)
        self.window = (window, window)
        self.pool = pool
        self.remainder = remainder
        self.grid_norm = ImageNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.ds_norm = ImageNorm(dim)
        self.kv = nn.Linear(dim, 2 * dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        z = self.grid_norm(x_BHWC + self.inside_windows(self.norm(x_BHWC)))
        k, v = self.kv(self.ds_norm(self.pooled(z)).flatten(1, 2)).chunk(2, dim=-1)
        out = attend(self.q(z).flatten(1, 2), k, v, self.num_heads).view(z.shape)
        return self.proj(z + out)

    def pooled(self, x_BHWC: Tensor) -> Tensor:
        """Average cells of `pool` x `pool`; incomplete ones are the mean of what they hold, or dropped."""
        if self.remainder == "truncate" or not torch.compiler.is_compiling():
            return to_map(F.avg_pool2d(to_nchw(x_BHWC), self.pool, ceil_mode=self.remainder == "pad"))
        means = to_map(F.avg_pool2d(to_nchw(pad_to_multiple(x_BHWC, self.pool)), self.pool))
        rows, columns = (  # the share of a cell that is not padding
            (side - self.pool * torch.arange(cells, device=means.device)).clamp(max=self.pool) / self.pool
            for side, cells in zip(x_BHWC.shape[1:3], means.shape[1:3], strict=True)
        )
        return means / (rows[:, None] * columns)[..., None].to(means.dtype)

    def inside_windows(self, x_BHWC: Tensor) -> Tensor:
        grid = (x_BHWC.shape[1], x_BHWC.shape[2])
        mask = window_padding(grid, self.window, self.num_heads, x_BHWC.device)
        qkv = partition(self.qkv(x_BHWC), self.window)
        out = window_attention(qkv, self.num_heads, self.window[0] * self.window[1], mask)
        return merge(out, grid, self.window)


class InvertedResidual(ConvMlp):
    """Feed-forward network: norm → 1x1 → SiLU → depthwise → SiLU → 1x1 → norm, without biases."""

    def __init__(self, dim: int, hidden: int, kernel: int) -> None:
        super().__init__(dim, hidden, nn.SiLU, nn.SiLU, kernel=kernel, bias=False)
        self.norm1 = ImageNorm(dim)
        self.norm2 = ImageNorm(dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.norm2(super().forward(self.norm1(x_BHWC)))


class HATBlock(nn.Module):
    """x ← x + DropPath(Attn(x)); x ← x + DropPath(IR(x)). The norms are inside the branches."""

    def __init__(self, attn: nn.Module, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.attn = attn
        self.mlp = mlp
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x = x_BHWC + self.drop_path1(self.attn(x_BHWC))
        return x + self.drop_path2(self.mlp(x))


class HATNet(Pyramid):
    """HAT-Net (section 3.3). The dense form (there is no published one) returns the maps of the four stages.

    `grid_sizes`: side of each stage's windows, in positions of its map; 1 means plain attention. `ds_ratios`: the
    factor by which the pooled map is smaller. `remainder`: whether pooling keeps ("pad") or drops ("truncate") rows and
    columns that do not fill a cell.
    """

    unused = ("proj_norm",)
    published_keys = (
        KeyRule("^patch_embed.0", "^stages.0.downsample.conv1"),
        KeyRule("^patch_embed.1", "^stages.0.downsample.norm1"),
        KeyRule("^patch_embed.3", "^stages.0.downsample.conv2"),
        KeyRule("^ds{i+1}.conv", "^stages.{i}.downsample.proj"),
        KeyRule("^ds{i+1}.norm", "^stages.{i}.downsample.norm"),
        KeyRule("^blocks.{i}.{j}", "^stages.{i}.blocks.{j}"),
        *(KeyRule(f"attn.{name}", f"attn.{name}", "conv") for name in ("qkv", "proj", "q", "kv")),
        KeyRule("conv.conv1.0", "mlp.norm1"),
        KeyRule("conv.conv1.1", "mlp.fc1", "conv"),
        KeyRule("conv.conv2.0", "mlp.dwconv"),
        KeyRule("conv.conv3.0", "mlp.fc2", "conv"),
        KeyRule("conv.conv3.1", "mlp.norm2"),
        KeyRule("^classifier.1", "^head"),
    )

    def __init__(
        self,
        embed_dims: PerStage[Count] = (64, 128, 320, 512),
        depths: PerStage[Depth] = (2, 3, 8, 3),
        head_dim: Count = 64,
        mlp_ratios: PerStage[Factor] = (8, 8, 4, 4),
        kernels: PerStage[Count] = (3, 3, 3, 3),
        grid_sizes: PerStage[Count] = (8, 7, 7, 1),
        ds_ratios: PerStage[Count] = (8, 4, 2, 1),
        remainder: Remainder = "pad",
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        **kwargs: Any,
    ) -> None:
        rates = drop_path_rates(drop_path_rate, depths)

        def block(i: int, rate: float) -> HATBlock:
            dim = embed_dims[i]
            attn = (
                HierarchicalAttention(dim, head_dim, grid_sizes[i], ds_ratios[i], remainder)
                if grid_sizes[i] > 1
                else PlainAttention(dim, head_dim)
            )
            return HATBlock(attn, InvertedResidual(dim, int(dim * mlp_ratios[i]), kernels[i]), rate)

        stages = [
            Stage(
                Downsample(embed_dims[i - 1], dim) if i else Stem(in_chans, dim),
                [block(i, rate) for rate in rates[i]],
            )
            for i, dim in enumerate(embed_dims)
        ]
        super().__init__(stages, embed_dims, None, in_chans=in_chans, **kwargs)
        pooled = zip(self.reductions, ds_ratios, grid_sizes, strict=True)
        cells = [stride * (ratio - 1) + 1 for stride, ratio, window in pooled if window > 1]
        self.minimum_size = max(1, *cells) if remainder == "truncate" else 1  # at least one whole cell in every stage
        self.apply(init_published)


@torch.no_grad()
def init_published(module: nn.Module) -> None:
    """Initialise linear layers and convolutions with a truncated normal (σ = 0.02) and zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


VARIANTS = {
    f"hatnet_{size}": Variant(
        published=f"hatnet_{size}",
        args={"depths": depths, "drop_rate": 0.2, **args},
        drop_path=0.1,
        top1={224: top1},
        notes=f"HAT_Net_{size} in the published code, which does not say what drop path its weights were trained with: "
        "0.1 is that of PVT, whose settings it names.",
    )
    for size, depths, args, top1 in (
        ("tiny", (2, 2, 6, 3), {"embed_dims": (48, 96, 240, 384), "head_dim": 48}, 79.8),
        ("small", (2, 3, 8, 3), {}, 82.6),
        ("medium", (3, 6, 18, 3), {"kernels": (5, 3, 5, 3)}, 84.0),
        ("large", (3, 8, 27, 3), {"embed_dims": (64, 128, 320, 640)}, 84.2),
    )
}

HATNET = Family(
    model=HATNet,
    variants=VARIANTS,
    paper="Vision Transformers with Hierarchical Attention, Machine Intelligence Research 21, 2024, arXiv 2106.03180",
    repository="yun-liu/HAT-Net",
    licence="none stated",
    size_policy="Any size: sizes round up at every stage, and maps are padded to whole windows with a mask. Pooling "
    "averages only the existing part of incomplete cells.",
    first_conv="stages.0.downsample.conv1",
)
