"""Shunted Transformer: one attention layer that looks at two scales.

In the first three stages, half of the heads see keys and values merged from s x s tokens and the other half from s/2 x
s/2, so that one layer captures both large and small objects. A depthwise convolution enhances the values, another one
is in the feed-forward network, and the stem is convolutional. There is no position embedding.

Paper: "Shunted Self-Attention via Multi-Scale Token Aggregation", Ren, Zhou, He, Feng, Wang, CVPR 2022,
arXiv 2111.15193. Published code and weights: OliverRensu/Shunted-Transformer (no licence stated).

Any input size: as published. The stem rounds up, then down; the other embeddings round up. Merging rounds down: rows
and columns that do not fill a cell are used as queries but not as keys. A map smaller than a cell, on which the
published code crashes, is zero-padded to one cell.

Quirks that checkpoints depend on: the values are enhanced before the attention in the stages that merge tokens and
after it in the last stage; norms have eps 1e-6, those of embeddings and merged tokens 1e-5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.layers.attention import Block
from anyres.layers.init import init_linear_and_convolution
from anyres.layers.maps import ConvMlp, depthwise, fold_into, on_map, pad_to_cell, with_residual
from anyres.layers.parts import parts_of
from anyres.layers.patch_embed import ConvEmbed
from anyres.layers.spatial_reduction import attend
from anyres.models._backbone import Family, Variant
from anyres.models._keys import KeyRule
from anyres.models._pyramid import Pyramid, Stage, drop_path_rates
from anyres.options import Count, Depth, Factor, PerStage, Rate, WholeNumber
from anyres.shapes import Grid


class Stem(nn.Module):
    """The stem (section 3.3), (B, H, W, in_chans) → (B, h, w, dim) with h = floor(ceil(H / 2) / 2).

    It has a 7x7 convolution of stride 2 and `depth` 3x3 convolutions, each with a batch norm and a ReLU; then a 2x2
    convolution of stride 2 and a LayerNorm.
    """

    def __init__(self, in_chans: int, dim: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(1 + depth):
            conv = nn.Conv2d(dim, dim, 3, 1, 1, bias=False) if i else nn.Conv2d(in_chans, dim, 7, 2, 3, bias=False)
            layers += [conv, nn.BatchNorm2d(dim), nn.ReLU()]
        self.conv = nn.Sequential(*layers, nn.Conv2d(dim, dim, 2, 2))
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def grid(self, height: int, width: int) -> Grid:
        return (height + 1) // 2 // 2, (width + 1) // 2 // 2

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.norm(on_map(self.conv, x_BHWC))

    def fold(self) -> None:
        """Fuse the batch norms into the convolutions before them; only for evaluation."""
        for i, norm in enumerate(self.conv):
            if isinstance(norm, nn.BatchNorm2d):
                conv = self.conv[i - 1]
                assert isinstance(conv, nn.Conv2d)
                fold_into(conv, norm)
                self.conv[i] = nn.Identity()


class TokenAggregation(nn.Module):
    """Keys and values of one group of heads (multi-scale token aggregation, equations 1 and 2).

    Each cell of `ratio` x `ratio` tokens is merged into one, a linear layer makes keys and values from it, and a
    depthwise convolution is added to the values.
    """

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.merge = nn.Conv2d(dim, dim, ratio, ratio)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.kv = nn.Linear(dim, dim)
        self.enhance = depthwise(dim // 2)

    def forward(self, x_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) → keys and values (B, M, C/2)."""
        merged = on_map(self.merge, pad_to_cell(x_BHWC, self.ratio))
        k, v = self.kv(F.gelu(self.norm(merged))).chunk(2, dim=-1)
        return k.flatten(1, 2), with_residual(self.enhance, v).flatten(1, 2)


class ShuntedAttention(nn.Module):
    """Shunted self-attention (section 3.1).

    The first half of the heads sees tokens merged by `ratio`, the second half by `ratio` / 2.
    """

    def __init__(self, dim: int, num_heads: int, ratio: int) -> None:
        super().__init__()
        self.group_heads = parts_of(dim, num_heads) // parts_of(num_heads, 2, "heads", "groups")
        self.q = nn.Linear(dim, dim)
        self.groups = nn.ModuleList([TokenAggregation(dim, ratio), TokenAggregation(dim, ratio // 2)])
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        out = []
        for q_BNC, group in zip(self.q(x_BHWC).flatten(1, 2).chunk(2, dim=-1), self.groups, strict=True):
            k_BMC, v_BMC = group(x_BHWC)
            out.append(attend(q_BNC, k_BMC, v_BMC, self.group_heads))
        return self.proj(torch.cat(out, dim=-1)).view(x_BHWC.shape)


class EnhancedAttention(nn.Module):
    """The last stage's attention over all tokens, plus a depthwise convolution of the values after it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, num_heads)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.local_conv = depthwise(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        k, v = self.kv(x_BHWC).chunk(2, dim=-1)
        q_BNC, k_BNC, v_BNC = (part.flatten(1, 2) for part in (self.q(x_BHWC), k, v))
        out = attend(q_BNC, k_BNC, v_BNC, self.num_heads).view(x_BHWC.shape)
        return self.proj(out + on_map(self.local_conv, v))


class Shunted(Pyramid):
    """Shunted Transformer (section 3.4).

    A merging ratio of 1 means attention over all tokens. The dense form is the same network without a head.
    """

    published_keys = (
        KeyRule("^patch_embed{i+1}", "^stages.{i}.downsample"),
        KeyRule("^block{i+1}.{j}", "^stages.{i}.blocks.{j}"),
        KeyRule("^norm{i+1}", "^stages.{i}.norm"),
        KeyRule("attn.sr{i+1}", "attn.groups.{i}.merge"),
        KeyRule("attn.norm{i+1}", "attn.groups.{i}.norm"),
        KeyRule("attn.kv{i+1}", "attn.groups.{i}.kv"),
        KeyRule("attn.local_conv{i+1}", "attn.groups.{i}.enhance"),
        KeyRule("mlp.dwconv.dwconv", "mlp.dwconv"),
    )

    def __init__(
        self,
        embed_dims: PerStage[Count] = (64, 128, 256, 512),
        depths: PerStage[Depth] = (1, 2, 4, 1),
        num_heads: PerStage[Count] = (2, 4, 8, 16),
        mlp_ratios: PerStage[Factor] = (8, 8, 4, 4),
        ratios: PerStage[Count] = (8, 4, 2, 1),
        stem_depth: WholeNumber = 0,
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        **kwargs: Any,
    ) -> None:
        rates = drop_path_rates(drop_path_rate, depths)

        def block(i: int, rate: float) -> Block:
            dim, heads = embed_dims[i], num_heads[i]
            attn = ShuntedAttention(dim, heads, ratios[i]) if ratios[i] > 1 else EnhancedAttention(dim, heads)
            return Block(dim, attn, ConvMlp(dim, int(dim * mlp_ratios[i]), residual=True), rate)

        stages = [
            Stage(
                ConvEmbed(embed_dims[i - 1], dim, 3, 2, 1) if i else Stem(in_chans, dim, stem_depth),
                [block(i, rate) for rate in rates[i]],
                nn.LayerNorm(dim, eps=1e-6),
            )
            for i, dim in enumerate(embed_dims)
        ]
        super().__init__(stages, embed_dims, None, in_chans=in_chans, **kwargs)
        self.minimum_size = 3
        self.apply(init_linear_and_convolution)


VARIANTS = {
    f"shunted_{size}": Variant(
        published=f"shunted_{size[0]}",
        args={"depths": depths, "stem_depth": stem_depth},
        drop_path=drop_path,
        top1={224: top1},
    )
    for size, depths, stem_depth, drop_path, top1 in (
        ("tiny", (1, 2, 4, 1), 0, 0.1, 79.8),
        ("small", (2, 4, 12, 1), 1, 0.2, 82.9),
        ("base", (3, 4, 24, 2), 2, 0.3, 84.0),
    )
}

FAMILY = Family(
    model=Shunted,
    variants=VARIANTS,
    paper="Shunted Self-Attention via Multi-Scale Token Aggregation, CVPR 2022, arXiv 2111.15193",
    repository="OliverRensu/Shunted-Transformer",
    licence="none stated",
    size_policy="Any size from 3 up, as published: the stem's first layer rounds up and its last rounds down; later "
    "stages round up. Nothing stored depends on the size.",
    first_conv="stages.0.downsample.conv.0",
)
