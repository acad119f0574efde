"""ScalableViT: windows that a convolution connects, and global attention of adjustable width.

Two kinds of blocks alternate. The first attends inside windows and adds a depthwise convolution of the values over the
whole map, which crosses the windows' borders (IWSA). The second attends to a reduced map, with queries and keys wider
or narrower than the map (SSA: scalable in space by s and in channels by `channel_ratios`). Positions come from a
depthwise convolution after the first block of each stage.

Paper: "ScalableViT: Rethinking the Context-oriented Generalization of Vision Transformer", Yang, Ma, Wu, Tang, Xiao,
Zheng, Li, ECCV 2022, arXiv 2203.10790. Published code and weights: Yangr116/ScalableViT (no licence stated).

Any input size: sizes round up at every stage, and no weight depends on them. The published code accepts only multiples
of 224. At other sizes, maps are padded at the right and the bottom: to multiples of the window with masked keys, and to
multiples of s with zeros that enter the reduction, so that every position contributes to a key.

Quirks that checkpoints depend on: all norms have eps 1e-6 except the reduction's, 1e-5; the last stage, which has no
reduction, keeps its heads 32 wide for every channel ratio, but scales logits by the width that the ratio implies; the
classifier has a hidden layer 4096 wide (none with `plain_head`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.layers.attention import Block
from anyres.layers.init import init_linear_and_convolution
from anyres.layers.maps import depthwise, on_map, pad_to_multiple
from anyres.layers.parts import parts_of
from anyres.layers.patch_embed import ConvEmbed
from anyres.layers.spatial_reduction import SpatialReductionAttention, attend
from anyres.layers.unshifted_windows import UnshiftedWindowAttention
from anyres.layers.windows import merge
from anyres.models._backbone import Family, Variant
from anyres.models._keys import KeyRule
from anyres.models._pyramid import PositionedStage, Pyramid, drop_path_rates
from anyres.options import Count, Depth, Factor, PerStage, Rate


class InteractiveWindowAttention(UnshiftedWindowAttention):
    """IWSA: attention inside windows, plus a depthwise convolution of the values, before the projection.

    The convolution (the local interactive module) runs over the whole map.
    """

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__(dim, num_heads, window)
        self.local = depthwise(dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        out_BHWC, v_BMC = self.attend(x_BHWC)
        v_BHWC = merge(v_BMC, (x_BHWC.shape[1], x_BHWC.shape[2]), self.window)
        return self.proj(out_BHWC + on_map(self.local, v_BHWC))


class ScalableAttention(nn.Module):
    """SSA: queries and keys of width C·ratio, and keys and values from a map that is `reduction` times smaller.

    The reduction consists of a depthwise and a 1x1 convolution, a norm and a GELU.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int, ratio: float) -> None:
        super().__init__()
        width = int(dim * ratio)
        self.num_heads = parts_of(width, parts_of(dim, num_heads))
        self.reduction = reduction
        self.q = nn.Linear(dim, width)
        self.depthwise = nn.Conv2d(dim, dim, reduction, reduction, groups=dim)
        self.pointwise = nn.Linear(dim, width)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        q, reduced = self.q(x_BHWC.flatten(1, 2)), self.reduce(x_BHWC)
        out = attend(q, self.k(reduced), self.v(reduced), self.num_heads)
        return self.proj(out).view(x_BHWC.shape)

    def reduce(self, x_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) → (B, ceil(H / s)·ceil(W / s), C·ratio)."""
        reduced = on_map(self.depthwise, pad_to_multiple(x_BHWC, self.reduction))
        return F.gelu(self.norm(self.pointwise(reduced.flatten(1, 2))))


class ScalableViT(Pyramid):
    """ScalableViT: alternating blocks of IWSA and SSA, in this order, in every stage.

    Args:
        reductions: s of each stage; 1 means plain global attention.
        channel_ratios: width of SSA's queries and keys in each stage, as a multiple of the map's width.
        windows: side of IWSA's windows in each stage; no weight depends on it.
        plain_head: use a single linear layer as the head, without a hidden layer.
    """

    no_decay = ("position",)
    published_keys = (
        KeyRule("^patch_embeds.{i}", "^stages.{i}.downsample"),
        KeyRule("^pos_block.{i}.proj.0", "^stages.{i}.position"),
        KeyRule("^stages.{i}.{j}", "^stages.{i}.blocks.{j}"),
        KeyRule("attn.lim_func", "attn.local"),
        KeyRule("attn.reduction.0", "attn.depthwise"),
        KeyRule("attn.reduction.1", "attn.pointwise", "conv"),
        KeyRule("attn.norm_act.0", "attn.norm"),
        KeyRule("^head.{i}", "^hidden.{i}"),
        KeyRule("^hidden.3", "^head"),
    )

    def __init__(
        self,
        embed_dims: PerStage[Count] = (64, 128, 256, 512),
        depths: PerStage[Depth] = (2, 2, 20, 2),
        num_heads: PerStage[Count] = (2, 4, 8, 16),
        mlp_ratios: PerStage[Factor] = (4, 4, 4, 4),
        reductions: PerStage[Count] = (8, 4, 2, 1),
        channel_ratios: PerStage[Factor] = (1.25, 1.25, 1.25, 1),
        windows: PerStage[Count] = (7, 7, 7, 7),
        plain_head: bool = False,
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        dense: bool = False,
        **kwargs: Any,
    ) -> None:
        rates = drop_path_rates(drop_path_rate, depths)

        def attention(i: int, j: int) -> nn.Module:
            dim, heads, ratio = embed_dims[i], num_heads[i], channel_ratios[i]
            if j % 2 == 0:
                return InteractiveWindowAttention(dim, heads, windows[i])
            if reductions[i] == 1:
                return SpatialReductionAttention(dim, heads, scale=(dim // heads * ratio) ** -0.5)
            return ScalableAttention(dim, heads, reductions[i], ratio)

        stages = [
            PositionedStage(
                ConvEmbed(embed_dims[i - 1], dim, 3, 2, 1, 1e-6) if i else ConvEmbed(in_chans, dim, 7, 4, 3, 1e-6),
                [
                    Block(dim, attention(i, j), Mlp(dim, int(dim * mlp_ratios[i])), rate)
                    for j, rate in enumerate(rates[i])
                ],
                dim,
            )
            for i, dim in enumerate(embed_dims)
        ]
        norm = nn.LayerNorm(embed_dims[-1], eps=1e-6)
        super().__init__(stages, embed_dims, norm, in_chans=in_chans, dense=dense, **kwargs)
        self.minimum_size = 1
        self.hidden = nn.Sequential()
        if not plain_head and not dense:
            self.head_hidden_size = 4096
            self.hidden.extend((nn.Linear(embed_dims[-1], 4096), nn.LayerNorm(4096, eps=1e-6), nn.GELU()))
            self.reset_classifier(self.num_classes)
        self.apply(init_linear_and_convolution)
        for module in self.modules():
            if isinstance(module, ScalableAttention):  # initialised as a convolution
                nn.init.normal_(module.pointwise.weight, std=math.sqrt(2 / module.pointwise.out_features))

    def pool(self, features: Tensor) -> Tensor:
        """Pool as in `Pyramid`, then apply the head's hidden layer: (B, 4096)."""
        return self.hidden(super().pool(features))

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        if prune_head:
            self.hidden = nn.Sequential()
            self.head_hidden_size = self.num_features
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    @classmethod
    def to_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        published = super().to_published(state)
        if "head.0.weight" in published:
            return published
        return {name.replace("head.3.", "head."): tensor for name, tensor in published.items()}


VARIANTS = {
    f"scalablevit_{size}": Variant(
        published=f"scalable_vit_{size}",
        args={
            "embed_dims": tuple(width * 2**i for i in range(4)),
            "depths": depths,
            "num_heads": tuple(width // 32 * 2**i for i in range(4)),
            "channel_ratios": channel_ratios,
        },
        drop_path=drop_path,
        top1={224: top1},
        notes=notes,
    )
    for size, width, depths, channel_ratios, drop_path, top1, notes in (
        (
            "small", 64, (2, 2, 20, 2), (1.25, 1.25, 1.25, 1), 0.2, 83.1,
            "As the published code builds it, 32.0 M parameters; the paper gives 32.4 M. `scalable_vit_small_0` of the "
            "same code is this with channel_ratios (1.25, 1.25, 1.25, 1.25) and plain_head.",
        ),
        ("base", 96, (2, 2, 14, 6), (2, 1.25, 1.25, 1), 0.5, 84.1, ""),
        (
            "large", 128, (2, 6, 12, 4), (0.25, 0.5, 1, 1), 0.5, 84.4,
            "As the published code builds it, 109.3 M parameters; the paper gives 104.9 M.",
        ),
    )
}  # fmt: skip

FAMILY = Family(
    model=ScalableViT,
    variants=VARIANTS,
    paper="ScalableViT: Rethinking the Context-oriented Generalization of Vision Transformer, ECCV 2022, "
    "arXiv 2203.10790",
    repository="Yangr116/ScalableViT",
    licence="none stated",
    size_policy="Any size: sizes round up at every stage. Maps are zero-padded to multiples of the window, with a "
    "mask, and of the reduction, without one.",
    first_conv="stages.0.downsample.proj",
)
