"""Twins: pyramids that alternate attention inside windows with attention to a reduced map, or use only the latter.

In both networks, positions come from a depthwise convolution after the first block of each stage (the conditional
position encoding of CPVT). PCPVT is PVT with this convolution in place of its tables and class token. SVT alternates
attention inside unshifted 7x7 windows (LSA) with PVT's attention to a reduced map (GSA).

Paper: "Twins: Revisiting the Design of Spatial Attention in Vision Transformers", Chu, Tian, Wang, Zhang, Ren, Wei,
Xia, Shen, NeurIPS 2021, arXiv 2104.13840; position encoding: arXiv 2102.10882. Published code and weights:
Meituan-AutoML/Twins (Apache-2.0).

Any input size: embeddings and reductions round down, as published (up to 31 rows and columns of the image are ignored).
The published SVT classifier accepts only multiples of 224; here all sizes are handled as in the published detection
code: maps are zero-padded at the right and the bottom to multiples of the window, and padded tokens are ordinary keys.
`mask_padding=True` follows the published segmentation code, which hides them, but only if both sides need padding (its
index arithmetic hides nothing if one does not).

Quirks that checkpoints depend on: norms of blocks, stages and head have eps 1e-6, those of embeddings and reductions
1e-5; detectors and segmentation models on SVT were trained with a norm at the end of every stage, which also feeds the
next stage (`stage_norms`, on by default in the dense form) and which ImageNet files lack. Published dense files contain
the classifier's unused norm and head; to load such a file completely, use `stage_norms=True` without `dense`.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from anyres.layers.attention import Block
from anyres.layers.init import init_linear_and_convolution
from anyres.layers.patch_embed import ConvEmbed
from anyres.layers.sizes import known, missing
from anyres.layers.spatial_reduction import SpatialReductionAttention
from anyres.layers.unshifted_windows import UnshiftedWindowAttention
from anyres.models._backbone import Family, Variant
from anyres.models._keys import KeyRule
from anyres.models._pyramid import PositionedStage, Pyramid, drop_path_rates
from anyres.options import Count, Depth, Factor, PerStage, Rate
from anyres.shapes import Grid


class LocallyGroupedAttention(UnshiftedWindowAttention):
    """LSA (section 3.2): attention inside windows.

    Padding acts as keys and values equal to the biases of k and v. With `mask_padding`, it is masked if both sides of
    the map are padded.
    """

    def __init__(self, dim: int, num_heads: int, window: int = 7, mask_padding: bool = False) -> None:
        super().__init__(dim, num_heads, window)
        self.mask_padding = mask_padding

    def mask(self, grid: Grid, device: torch.device) -> Tensor | None:
        if not self.mask_padding:
            return None
        rows, columns = (missing(side, extent) for side, extent in zip(grid, self.window, strict=True))
        mask = super().mask(grid, device)
        if mask is None or known(rows * columns == 0):
            return None
        return mask if known(rows * columns > 0) else mask | (torch.full((), rows * columns, device=device) == 0)


class Twins(Pyramid):
    """Both networks (sections 3.1 and 3.2).

    Global sub-sampled attention (GSA) is that of PVT; `reductions` are its strides in each stage.

    Args:
        window: side of the windows in every other block, starting with the first (SVT); None for no windows (PCPVT).
        mask_padding: mask padding as in the published segmentation code (see the module docstring).
        stage_norms: add a norm at the end of every stage; by default only in the dense form of SVT.
    """

    no_decay = ("position",)
    published_keys = (
        KeyRule("^patch_embeds.{i}", "^stages.{i}.downsample"),
        KeyRule("^pos_block.{i}.proj.0", "^stages.{i}.position"),
        KeyRule("^blocks.{i}.{j}", "^stages.{i}.blocks.{j}"),
        KeyRule("^norm_list.{i}", "^stages.{i}.norm"),
    )

    def __init__(
        self,
        embed_dims: PerStage[Count] = (64, 128, 320, 512),
        depths: PerStage[Depth] = (3, 4, 6, 3),
        num_heads: PerStage[Count] = (1, 2, 5, 8),
        mlp_ratios: PerStage[Factor] = (8, 8, 4, 4),
        reductions: PerStage[Count] = (8, 4, 2, 1),
        window: Count | None = None,
        mask_padding: bool = False,
        stage_norms: bool | None = None,
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        dense: bool = False,
        **kwargs: Any,
    ) -> None:
        rates = drop_path_rates(drop_path_rate, depths)
        if stage_norms is None:
            stage_norms = dense and window is not None

        def attention(i: int, j: int) -> nn.Module:
            if window is not None and j % 2 == 0:
                return LocallyGroupedAttention(embed_dims[i], num_heads[i], window, mask_padding)
            return SpatialReductionAttention(embed_dims[i], num_heads[i], reductions[i])

        stages = [
            PositionedStage(
                ConvEmbed(embed_dims[i - 1], dim, 2, 2) if i else ConvEmbed(in_chans, dim, 4, 4),
                [
                    Block(dim, attention(i, j), Mlp(dim, int(dim * mlp_ratios[i])), rate)
                    for j, rate in enumerate(rates[i])
                ],
                dim,
                nn.LayerNorm(dim, eps=1e-6) if stage_norms else None,
            )
            for i, dim in enumerate(embed_dims)
        ]
        norm = nn.LayerNorm(embed_dims[-1], eps=1e-6)
        super().__init__(stages, embed_dims, norm, in_chans=in_chans, dense=dense, **kwargs)
        self.minimum_size = 32
        self.apply(init_linear_and_convolution)


PCPVT_VARIANTS = {
    f"twins_pcpvt_{size}": Variant(
        published=f"pcpvt_{size}", args={"depths": depths}, drop_path=drop_path, top1={224: top1}
    )
    for size, depths, drop_path, top1 in (
        ("small", (3, 4, 6, 3), 0.2, 81.2),
        ("base", (3, 4, 18, 3), 0.3, 82.7),
        ("large", (3, 8, 27, 3), 0.5, 83.1),
    )
}
SVT_VARIANTS = {
    f"twins_svt_{size}": Variant(
        published=f"alt_gvt_{size}",
        args={
            "embed_dims": tuple(width * 2**i for i in range(4)),
            "depths": depths,
            "num_heads": tuple(width // 32 * 2**i for i in range(4)),
            "mlp_ratios": (4, 4, 4, 4),
            "window": 7,
        },
        drop_path=drop_path,
        top1={224: top1},
    )
    for size, width, depths, drop_path, top1 in (
        ("small", 64, (2, 2, 10, 4), 0.2, 81.7),
        ("base", 96, (2, 2, 18, 2), 0.3, 83.2),
        ("large", 128, (2, 2, 18, 2), 0.5, 83.7),
    )
}

_PAPER = "Twins: Revisiting the Design of Spatial Attention in Vision Transformers, NeurIPS 2021, arXiv 2104.13840"
PCPVT = Family(
    model=Twins,
    variants=PCPVT_VARIANTS,
    paper=_PAPER,
    repository="Meituan-AutoML/Twins",
    licence="Apache-2.0",
    size_policy="Any size from 32 up, as published: each embedding rounds down. Nothing stored depends on the size.",
    first_conv="stages.0.downsample.proj",
)
SVT = Family(
    model=Twins,
    variants=SVT_VARIANTS,
    paper=_PAPER,
    repository="Meituan-AutoML/Twins",
    licence="Apache-2.0",
    size_policy="Any size from 32 up: each embedding rounds down, and maps are zero-padded to multiples of the window, "
    "as in the published detection code.",
    first_conv="stages.0.downsample.proj",
)
