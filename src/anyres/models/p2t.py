"""P2T: attention of every position to a pyramid of pooled maps.

The map is average-pooled to four sizes, a depthwise convolution is added to each, and keys and values come from their
concatenation. This short sequence provides context at several scales for the cost of a few dozen keys. The feed-forward
network is an inverted residual whose depthwise convolution is the only source of position information. There is no
position table, class token or final norm.

Paper: "P2T: Pyramid Pooling Transformer for Scene Understanding", Wu, Liu, Zhan, Cheng, TPAMI 2022 (volume 45, 2023),
arXiv 2106.12011. Published code and weights: yuhuan-wu/P2T (CC BY-NC-SA 4.0: not for commercial use).

Any input size: sizes round up at every stage, and no weight depends on them. The number of keys depends on the map:
level p pools H x W to round(H / p) x round(W / p), with Python's rounding of halves to even numbers. Checkpoints depend
on this rounding, which makes no difference at 224 but does at 160 or 288. The published classifier needs sides of at
least 65, because a level would otherwise be empty; here every level has at least one cell. The published dense code
accepts only multiples of 32.

Quirks that checkpoints depend on: the depthwise convolutions of the levels belong to the stage and are shared by all
its blocks; the feed-forward network has two Hardswish activations; block norms have eps 1e-6, those of embeddings and
keys 1e-5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anyres.layers.attention import Block
from anyres.layers.init import init_linear
from anyres.layers.maps import ConvMlp, depthwise, with_residual
from anyres.layers.parts import parts_of
from anyres.layers.patch_embed import ConvEmbed
from anyres.layers.resample import average_map
from anyres.layers.sizes import at_least_one
from anyres.layers.spatial_reduction import attend
from anyres.models._backbone import Family, Variant
from anyres.models._keys import KeyRule
from anyres.models._pyramid import Pyramid, Run, Stage, drop_path_rates
from anyres.options import Count, Depth, Factor, PerStage, Rate


def rounded(side: int, ratio: int) -> int:
    """Return side / ratio rounded to the nearest whole number, and halves to the even one."""
    quotient = side // ratio
    odd = quotient - quotient // 2 * 2
    return (2 * side + ratio - 1 + odd) // (2 * ratio)


class PyramidPooling(nn.ModuleList):
    """Pyramid pooling (section 3.2): the map pooled by each of `ratios`, plus a depthwise convolution, concatenated."""

    def __init__(self, dim: int, ratios: Sequence[int]) -> None:
        super().__init__(depthwise(dim) for _ in ratios)
        self.ratios = ratios

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) → (B, M, C)."""
        levels = []
        for ratio, conv in zip(self.ratios, self, strict=True):
            height, width = (at_least_one(rounded(side, ratio)) for side in x_BHWC.shape[1:3])
            pooled = average_map(x_BHWC, (height, width))
            levels.append(with_residual(conv, pooled).flatten(1, 2))
        return torch.cat(levels, dim=1)


class PoolingAttention(nn.Module):
    """Pooling-based attention (section 3.2): queries from the map, keys and values from its pyramid."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, num_heads)
        self.q = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor, pooling: PyramidPooling) -> Tensor:
        k, v = self.kv(self.norm(pooling(x_BHWC))).chunk(2, dim=-1)
        return self.proj(attend(self.q(x_BHWC.flatten(1, 2)), k, v, self.num_heads)).view(x_BHWC.shape)


class PoolingStage(Stage):
    """Embedding, then blocks that share the convolutions of one pyramid pooling."""

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module], pooling: PyramidPooling) -> None:
        super().__init__(downsample, blocks)
        self.pooling = pooling

    def forward(self, x: Tensor, extra: Tensor | None, run: Run) -> tuple[Tensor, Tensor | None]:
        x = self.downsample(x)
        for block in self.blocks:
            x = run(block, x, self.pooling)
        return self.norm(x), extra


class P2T(Pyramid):
    """P2T (section 3.1); `pool_ratios` are the pooling factors of the pyramid's levels, for each stage."""

    published_keys = (
        KeyRule("^patch_embed{i+1}", "^stages.{i}.downsample"),
        KeyRule("^d_convs{i+1}.{j}", "^stages.{i}.pooling.{j}"),
        KeyRule("^block{i+1}.{j}", "^stages.{i}.blocks.{j}"),
        KeyRule("attn.q.0", "attn.q"),
        KeyRule("attn.kv.0", "attn.kv"),
        KeyRule("mlp.fc1", "mlp.fc1", "conv"),
        KeyRule("mlp.conv", "mlp.dwconv"),
        KeyRule("mlp.fc2", "mlp.fc2", "conv"),
    )

    def __init__(
        self,
        embed_dims: PerStage[Count] = (64, 128, 320, 512),
        depths: PerStage[Depth] = (2, 2, 9, 3),
        num_heads: PerStage[Count] = (1, 2, 5, 8),
        mlp_ratios: PerStage[Factor] = (8, 8, 4, 4),
        pool_ratios: PerStage[Sequence[Count]] = ((12, 16, 20, 24), (6, 8, 10, 12), (3, 4, 5, 6), (1, 2, 3, 4)),
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        **kwargs: Any,
    ) -> None:
        rates = drop_path_rates(drop_path_rate, depths)

        def block(i: int, rate: float) -> Block:
            dim = embed_dims[i]
            mlp = ConvMlp(dim, int(dim * mlp_ratios[i]), act=nn.Hardswish, act1=nn.Hardswish)
            return Block(dim, PoolingAttention(dim, num_heads[i]).apply(init_linear), mlp, rate)

        stages = [
            PoolingStage(
                ConvEmbed(embed_dims[i - 1], dim, 3, 2, 1) if i else ConvEmbed(in_chans, dim, 7, 4, 3),
                [block(i, rate) for rate in rates[i]],
                PyramidPooling(dim, pool_ratios[i]),
            )
            for i, dim in enumerate(embed_dims)
        ]
        super().__init__(stages, embed_dims, None, in_chans=in_chans, **kwargs)
        self.minimum_size = 1


VARIANTS = {
    f"p2t_{size}": Variant(
        published=f"p2t_{size}",
        args={"depths": depths, **args},
        drop_path=drop_path,
        top1={224: top1},
    )
    for size, depths, args, drop_path, top1 in (
        ("tiny", (2, 2, 6, 3), {"embed_dims": (48, 96, 240, 384)}, 0.1, 79.8),
        ("small", (2, 2, 9, 3), {}, 0.1, 82.4),
        ("base", (3, 4, 18, 3), {}, 0.3, 83.5),
        ("large", (3, 8, 27, 3), {"embed_dims": (64, 128, 320, 640)}, 0.3, 83.9),
    )
}

FAMILY = Family(
    model=P2T,
    variants=VARIANTS,
    paper="P2T: Pyramid Pooling Transformer for Scene Understanding, TPAMI 2022, arXiv 2106.12011",
    repository="yuhuan-wu/P2T",
    licence="CC-BY-NC-SA-4.0",
    size_policy="Any size: sizes round up at every stage. Pooled maps scale with the map and have at least one cell.",
    first_conv="stages.0.downsample.proj",
)
