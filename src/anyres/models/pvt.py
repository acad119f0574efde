"""PVT: a pyramid whose attention keeps every query but shrinks the keys and values (spatial-reduction attention).

Four stages at strides 4, 8, 16, 32. In version 1, each stage has a learned position table and the last stage has a
class token. Version 2 replaces both by overlapping patch embeddings and a depthwise convolution inside the feed-forward
network, ends every stage with a norm, and in its linear form pools keys and values to 7x7.

Papers: "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions", Wang, Xie, Li,
Fan, Song, Liang, Lu, Luo, Shao, ICCV 2021, arXiv 2102.12122; "PVT v2: Improved Baselines with Pyramid Vision
Transformer", the same, Computational Visual Media 2022, arXiv 2106.13797. Published code and weights: whai362/PVT
(Apache-2.0).

Any input size: as published. Version 1 rounds down at every embedding (up to 31 rows and columns of the image are
ignored) and resizes its tables bilinearly to the current grids; version 2 rounds up. The reduction rounds down in both:
rows and columns that do not fill a cell are used as queries but not as keys. To decide whether to resize, the published
version 1 compares every stage with the first, which crashes at 448x448; here each stage compares its own grid.

Quirks that checkpoints depend on: block norms and final norms have eps 1e-6, those of embeddings and of the reduction
1e-5; the class token's row of the last table is never resized.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.errors import UserError
from anyres.layers.attention import Block
from anyres.layers.init import init_linear, init_linear_and_convolution
from anyres.layers.maps import ConvMlp, on_map
from anyres.layers.parameter_cache import cached_for_parameter
from anyres.layers.patch_embed import ConvEmbed
from anyres.layers.resample import average_map, resample_table
from anyres.layers.sizes import same
from anyres.layers.spatial_reduction import SpatialReductionAttention
from anyres.models._backbone import Family, Variant, pair
from anyres.models._keys import KeyRule, Layout
from anyres.models._pyramid import Pyramid, Run, Stage, drop_path_rates
from anyres.options import Count, Depth, Factor, PerStage, Rate, SideOrPair
from anyres.shapes import Grid

_TRANSFORMERS_REST = (
    KeyRule("layer_norm_1", "norm1"),
    KeyRule("layer_norm_2", "norm2"),
    KeyRule("mlp.dense1", "mlp.fc1"),
    KeyRule("mlp.dense2", "mlp.fc2"),
    KeyRule("^classifier", "^head"),
)
"""What both versions have in common in transformers."""


# Version 1 ------------------------------------------------------------------------------------------------------------


@cached_for_parameter()
def position_map(table: Tensor, native: Grid, grid: Grid, rows: int) -> Tensor:
    """Return a stage's table as a map (1, h, w, C), without its first `rows` rows (those of the class token).

    If the grid is not the native one, the map is resized bilinearly with half-pixel centres and without antialiasing.
    """
    picture = table[:, rows:].unflatten(1, native)
    if same(native, grid):
        return picture
    return resample_table(picture.permute(0, 3, 1, 2), grid, "bilinear").permute(0, 2, 3, 1).to(table.dtype)


class PVTStage(Stage):
    """Embedding, position table and blocks.

    The table's first `rows` rows (0 or 1) belong to the class token. The dense form keeps this row although it has no
    class token.
    """

    def __init__(
        self, downsample: nn.Module, blocks: Iterable[nn.Module], dim: int, native: Grid, rows: int, class_token: bool
    ) -> None:
        super().__init__(downsample, blocks)
        self.native = native
        self.rows = rows
        self.pos_embed = nn.Parameter(torch.empty(1, rows + native[0] * native[1], dim))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        for parameter in (self.pos_embed, self.cls_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor, extra: Tensor | None, run: Run) -> tuple[Tensor, Tensor | None]:
        x = self.downsample(x)
        grid = (x.shape[1], x.shape[2])
        x = x + position_map(self.pos_embed, self.native, grid, self.rows)
        if self.cls_token is None:
            for block in self.blocks:
                x = run(block, x)
            return self.norm(x), extra
        first = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        tokens = torch.cat((first, x.flatten(1, 2)), dim=1)
        for block in self.blocks:
            tokens = run(block, tokens)
        return self.norm(tokens[:, 1:].unflatten(1, grid)), tokens[:, :1]


class PVT(Pyramid):
    """PVT version 1 (section 3 of the first paper). The dense form has no class token and no final norm."""

    pools = ("token", "avg", "")
    no_decay = ("cls_token",)
    published_keys = (
        KeyRule("^patch_embed{i+1}", "^stages.{i}.downsample"),
        KeyRule("^pos_embed{i+1}", "^stages.{i}.pos_embed"),
        KeyRule("^block{i+1}.{j}", "^stages.{i}.blocks.{j}"),
        KeyRule("^cls_token", "^stages.3.cls_token"),
    )
    layouts = (
        Layout(
            "transformers",
            "encoder.patch_embeddings",
            (
                KeyRule("^encoder.patch_embeddings.3.cls_token", "^cls_token"),
                KeyRule("^encoder.patch_embeddings.{i}.position_embeddings", "^pos_embed{i+1}"),
                KeyRule("^encoder.patch_embeddings.{i}.projection", "^patch_embed{i+1}.proj"),
                KeyRule("^encoder.patch_embeddings.{i}.layer_norm", "^patch_embed{i+1}.norm"),
                KeyRule("^encoder.block.{i}.{j}", "^block{i+1}.{j}"),
                KeyRule("^encoder.layer_norm", "^norm"),
                KeyRule("attention.self.query", "attn.q"),
                KeyRule("attention.self.key", "attn.kv+0"),
                KeyRule("attention.self.value", "attn.kv+1"),
                KeyRule("attention.self.sequence_reduction", "attn.sr"),
                KeyRule("attention.self.layer_norm", "attn.norm"),
                KeyRule("attention.output.dense", "attn.proj"),
                *_TRANSFORMERS_REST,
            ),
            prefix=("pvt.",),
        ),
    )

    def __init__(
        self,
        embed_dims: PerStage[Count] = (64, 128, 320, 512),
        depths: PerStage[Depth] = (2, 2, 2, 2),
        num_heads: PerStage[Count] = (1, 2, 5, 8),
        mlp_ratios: PerStage[Factor] = (8, 8, 4, 4),
        reductions: PerStage[Count] = (8, 4, 2, 1),
        img_size: SideOrPair = 224,
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        dense: bool = False,
        **kwargs: Any,
    ) -> None:
        if reductions[-1] > 1 and not dense:
            raise UserError(f"reductions={tuple(reductions)} must end in 1: the last stage has a class token.")
        rates = drop_path_rates(drop_path_rate, depths)
        native = pair(img_size)
        stages = []
        for i, dim in enumerate(embed_dims):
            stride = 2 if i else 4
            native = (native[0] // stride, native[1] // stride)
            last = i == len(embed_dims) - 1
            stages.append(
                PVTStage(
                    ConvEmbed(embed_dims[i - 1] if i else in_chans, dim, stride, stride),
                    [
                        Block(
                            dim,
                            SpatialReductionAttention(dim, num_heads[i], reductions[i]),
                            Mlp(dim, int(dim * mlp_ratios[i])),
                            rate,
                        )
                        for rate in rates[i]
                    ],
                    dim,
                    native,
                    rows=int(last),
                    class_token=last and not dense,
                )
            )
        norm = nn.LayerNorm(embed_dims[-1], eps=1e-6)
        super().__init__(stages, embed_dims, norm, img_size=img_size, in_chans=in_chans, dense=dense, **kwargs)
        self.minimum_size = 32
        self.apply(init_linear)

    def finish(self, x_BHWC: Tensor, extra: Tensor | None) -> Tensor:
        """Return normed tokens (B, 1 + h·w, C), the class token first, or the normed map in the dense form."""
        if extra is None:
            return self.norm(x_BHWC)
        return self.norm(torch.cat((extra, x_BHWC.flatten(1, 2)), dim=1))

    def fit_tables(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize tables stored for another square native size, as in a forward pass."""
        resized = {}
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, PVTStage)
            name = f"stages.{i}.pos_embed"
            table = state.get(name)
            if table is None or table.shape == stage.pos_embed.shape:
                continue
            side = math.isqrt(max(table.shape[1] - stage.rows, 0))
            if side and side * side == table.shape[1] - stage.rows:
                patches = position_map(table, (side, side), stage.native, stage.rows).flatten(1, 2)
                resized[name] = torch.cat((table[:, : stage.rows], patches), dim=1)
        return resized


# Version 2 ------------------------------------------------------------------------------------------------------------


class LinearSpatialReductionAttention(SpatialReductionAttention):
    """Linear SRA (second paper, section 3.2), in every stage.

    Keys and values come from the map pooled to 7x7, followed by a 1x1 convolution, a norm and a GELU.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.reduction = 7
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def reduce(self, x_BHWC: Tensor) -> Tensor:
        pooled = average_map(x_BHWC, (self.reduction, self.reduction))
        return F.gelu(self.norm(on_map(self.sr, pooled).flatten(1, 2)))


class PVTv2(Pyramid):
    """PVT version 2 (section 3 of the second paper).

    `linear` gives PVTv2-Li. The dense form is the same network without a head.
    """

    published_keys = (
        KeyRule("^patch_embed{i+1}", "^stages.{i}.downsample"),
        KeyRule("^block{i+1}.{j}", "^stages.{i}.blocks.{j}"),
        KeyRule("^norm{i+1}", "^stages.{i}.norm"),
        KeyRule("mlp.dwconv.dwconv", "mlp.dwconv"),
    )
    layouts = (
        Layout("timm", "patch_embed.proj", (KeyRule("^patch_embed", "^stages.0.downsample"),)),
        Layout(
            "transformers",
            "patch_embedding.proj",
            (
                KeyRule("^encoder.layers.{i}.patch_embedding.layer_norm", "^patch_embed{i+1}.norm"),
                KeyRule("^encoder.layers.{i}.patch_embedding", "^patch_embed{i+1}"),
                KeyRule("^encoder.layers.{i}.blocks.{j}", "^block{i+1}.{j}"),
                KeyRule("^encoder.layers.{i}.layer_norm", "^norm{i+1}"),
                KeyRule("attention.query", "attn.q"),
                KeyRule("attention.key", "attn.kv+0"),
                KeyRule("attention.value", "attn.kv+1"),
                KeyRule("attention.spatial_reduction", "attn.sr"),
                KeyRule("attention.layer_norm", "attn.norm"),
                KeyRule("attention.proj", "attn.proj"),
                *_TRANSFORMERS_REST,
            ),
            prefix=("pvt_v2.",),
        ),
    )

    def __init__(
        self,
        embed_dims: PerStage[Count] = (64, 128, 320, 512),
        depths: PerStage[Depth] = (3, 4, 6, 3),
        num_heads: PerStage[Count] = (1, 2, 5, 8),
        mlp_ratios: PerStage[Factor] = (8, 8, 4, 4),
        reductions: PerStage[Count] = (8, 4, 2, 1),
        linear: bool = False,
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        **kwargs: Any,
    ) -> None:
        rates = drop_path_rates(drop_path_rate, depths)

        def block(i: int, rate: float) -> Block:
            dim, heads = embed_dims[i], num_heads[i]
            attn = (
                LinearSpatialReductionAttention(dim, heads)
                if linear
                else SpatialReductionAttention(dim, heads, reductions[i])
            )
            return Block(dim, attn, ConvMlp(dim, int(dim * mlp_ratios[i]), act1=nn.ReLU if linear else None), rate)

        stages = [
            Stage(
                ConvEmbed(embed_dims[i - 1], dim, 3, 2, 1) if i else ConvEmbed(in_chans, dim, 7, 4, 3),
                [block(i, rate) for rate in rates[i]],
                nn.LayerNorm(dim, eps=1e-6),
            )
            for i, dim in enumerate(embed_dims)
        ]
        super().__init__(stages, embed_dims, None, in_chans=in_chans, **kwargs)
        self.minimum_size = 1 if linear else 29
        self.apply(init_linear_and_convolution)


V1_VARIANTS = {
    f"pvt_{size}": Variant(published=f"pvt_{size}", args={"depths": depths}, drop_path=drop_path, top1={224: top1})
    for size, depths, drop_path, top1 in (
        ("tiny", (2, 2, 2, 2), 0.1, 75.1),
        ("small", (3, 4, 6, 3), 0.1, 79.8),
        ("medium", (3, 4, 18, 3), 0.3, 81.2),
        ("large", (3, 8, 27, 3), 0.3, 81.7),
    )
}
_B0 = {"embed_dims": (32, 64, 160, 256)}
V2_VARIANTS = {
    f"pvt_v2_{size}": Variant(
        published=f"pvt_v2_{size}", args={"depths": depths, **args}, drop_path=drop_path, top1={224: top1}
    )
    for size, depths, args, drop_path, top1 in (
        ("b0", (2, 2, 2, 2), _B0, 0.1, 70.5),
        ("b1", (2, 2, 2, 2), {}, 0.1, 78.7),
        ("b2", (3, 4, 6, 3), {}, 0.1, 82.0),
        ("b2_li", (3, 4, 6, 3), {"linear": True}, 0.1, 82.1),
        ("b3", (3, 4, 18, 3), {}, 0.3, 83.1),
        ("b4", (3, 8, 27, 3), {}, 0.3, 83.6),
        ("b5", (3, 6, 40, 3), {"mlp_ratios": (4, 4, 4, 4)}, 0.3, 83.8),
    )
}

V1 = Family(
    model=PVT,
    variants=V1_VARIANTS,
    paper="Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions, ICCV 2021, "
    "arXiv 2102.12122",
    repository="whai362/PVT",
    licence="Apache-2.0",
    size_policy="Any size from 32 up, as published: each embedding rounds down, and position tables are resized "
    "bilinearly to the grid of each stage.",
    first_conv="stages.0.downsample.proj",
)
V2 = Family(
    model=PVTv2,
    variants=V2_VARIANTS,
    paper="PVT v2: Improved Baselines with Pyramid Vision Transformer, Computational Visual Media 2022, "
    "arXiv 2106.13797",
    repository="whai362/PVT",
    licence="Apache-2.0",
    size_policy="Any size from 29 up (any size in the linear form), as published: sizes round up at every stage. "
    "Nothing stored depends on the size.",
    first_conv="stages.0.downsample.proj",
)
