"""CSWin: a pyramid with attention in stripes that are as long as the map.

Half of the heads attend inside vertical stripes, the other half inside horizontal ones, so that one block sees a cross.
The stripes widen with depth (1, 2, 7 lines, then the whole map). Positions come only from LePE, a depthwise 3x3
convolution of the values inside each stripe, which is added to the attention's output.

Paper: "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows", Dong, Bao, Chen, Zhang,
Yu, Yuan, Chen, Guo, CVPR 2022, arXiv 2107.00652. Published code and weights: microsoft/CSWin-Transformer (MIT).

Any input size: both forms follow the published dense code; the published classifier accepts only multiples of the
native size. If the stripe width does not divide a side of the map, zero queries, keys and values are added at both
ends; they are not masked, so each adds 1 to the softmax's denominator. At the native size the two published codes
agree. The same weights work with other stripe widths (`split_sizes`), for example the map's side at stride 32 in the
third stage.

Quirks that checkpoints depend on: all norms have eps 1e-5; the first embedding (kernel 7, stride 4, padding 2) floors;
the last stage has one branch with all heads and the others always have two (the published classifier has one if the map
is as large as the stripe, which changes its parameter shapes but happens in no published model); the large model has 24
heads in each of the last two stages.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Mlp
from torch import nn

from anyres.layers.attention import Block
from anyres.layers.init import init_linear
from anyres.layers.patch_embed import ConvEmbed
from anyres.layers.stripes import StripeAttention
from anyres.models._backbone import Family, Variant
from anyres.models._keys import KeyRule
from anyres.models._pyramid import Pyramid, Stage, drop_path_rates
from anyres.options import Count, Depth, Factor, PerStage, Rate, Three


class CSWin(Pyramid):
    """Four stages of cross-shaped windows (section 3).

    `split_sizes` are the stripe widths of the first three stages; the last attends over the whole map. The dense form
    has a norm on each output and none before the head.
    """

    averaged = True
    published_keys = (
        KeyRule("^merge{i}.conv", "^stages.{i}.downsample.proj"),
        KeyRule("^merge{i}.norm", "^stages.{i}.downsample.norm"),
        KeyRule("^stage1_conv_embed.0", "^stages.0.downsample.proj"),
        KeyRule("^stage1_conv_embed.2", "^stages.0.downsample.norm"),
        KeyRule("^stage{i+1}.{j}", "^stages.{i}.blocks.{j}"),
        KeyRule("^stages.{i}.blocks.{j}.qkv", "^stages.{i}.blocks.{j}.attn.qkv"),
        KeyRule("^stages.{i}.blocks.{j}.proj", "^stages.{i}.blocks.{j}.attn.proj"),
        KeyRule("attns.{k}.get_v", "attn.lepe.{k}"),
        KeyRule("^norm{i+1}", "^out_norms.{i}"),
    )

    def __init__(
        self,
        embed_dim: Count = 64,
        depths: PerStage[Depth] = (2, 4, 32, 2),
        num_heads: PerStage[Count] = (2, 4, 8, 16),
        split_sizes: Three[Count] = (1, 2, 7),
        mlp_ratio: Factor = 4.0,
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        **kwargs: Any,
    ) -> None:
        widths = [embed_dim * 2**i for i in range(4)]
        stripes = (*split_sizes, None)
        rates = drop_path_rates(drop_path_rate, depths)
        stages = [
            Stage(
                ConvEmbed(widths[i - 1], dim, 3, 2, 1) if i else ConvEmbed(in_chans, dim, 7, 4, 2),
                [
                    Block(
                        dim,
                        StripeAttention(dim, num_heads[i], stripes[i], ghosts=True),
                        Mlp(dim, int(dim * mlp_ratio)),
                        rate,
                        eps=1e-5,
                    )
                    for rate in rates[i]
                ],
            )
            for i, dim in enumerate(widths)
        ]
        out_norms = [nn.LayerNorm(dim) for dim in widths]
        super().__init__(stages, widths, nn.LayerNorm(widths[-1]), out_norms, in_chans=in_chans, **kwargs)
        self.minimum_size = 3
        self.apply(init_linear)


_BASE = {"embed_dim": 96, "num_heads": (4, 8, 16, 32)}
_LARGE = {"embed_dim": 144, "num_heads": (6, 12, 24, 24)}
_AT_384 = {"img_size": 384, "split_sizes": (1, 2, 12)}
VARIANTS = {
    name: Variant(
        published=published,
        args=args,
        drop_path=drop_path,
        top1={size: top1},
        train_sizes=(size,),
        crop_pct=0.9 if size == 224 else 1.0,
        notes=notes,
    )
    for name, published, args, drop_path, size, top1, notes in (
        ("cswin_tiny", "CSWin_64_12211_tiny_224", {"depths": (1, 2, 21, 1)}, 0.2, 224, 82.8, ""),
        ("cswin_small", "CSWin_64_24322_small_224", {}, 0.4, 224, 83.6, ""),
        ("cswin_base", "CSWin_96_24322_base_224", _BASE, 0.5, 224, 84.2, ""),
        (
            "cswin_base_384", "CSWin_96_24322_base_384", {**_BASE, **_AT_384}, 0.7, 384, 85.5,
            "Fine-tuned from the averaged 224 weights.",
        ),
        (
            "cswin_large", "CSWin_144_24322_large_224", _LARGE, 0.2, 224, 86.5,
            "Pretrained on ImageNet-22k; that file has a head of its own.",
        ),
        (
            "cswin_large_384", "CSWin_144_24322_large_384", {**_LARGE, **_AT_384}, 0.0, 384, 87.5,
            "Pretrained on ImageNet-22k; the drop path of its fine-tuning is not published.",
        ),
    )
}  # fmt: skip

FAMILY = Family(
    model=CSWin,
    variants=VARIANTS,
    paper="CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows, CVPR 2022, "
    "arXiv 2107.00652",
    repository="microsoft/CSWin-Transformer",
    licence="MIT",
    size_policy="Any size from 3 up, as in the published dense code: the first embedding rounds down, later ones round "
    "up. Maps that do not divide into whole stripes are zero-padded on both sides without a mask. Nothing stored "
    "depends on the size.",
    first_conv="stages.0.downsample.proj",
)
