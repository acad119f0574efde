"""CvT: a three-stage pyramid of global attention with convolutional token embeddings and q, k, v projections.

Each stage starts with an overlapping strided convolution; queries, keys and values go through a depthwise 3x3
convolution with batch norm before their linear layers, keys and values at half resolution. There is no other position
information. A class token joins the tokens of the last stage and skips the convolutions.

Paper: "CvT: Introducing Convolutions to Vision Transformers", Wu, Xiao, Codella, Liu, Dai, Yuan, Zhang, ICCV 2021,
arXiv 2103.15808. Published code and weights: microsoft/CvT (MIT).

Any input size: as published, for sides of at least 3 pixels; no weight depends on the size. The first embedding (7x7,
stride 4, padding 2) makes floor((H - 3) / 4) + 1 rows, which is one fewer than ceil(H / 4) if H mod 4 is 2; the last
row or column of the image is then not read. The later embeddings round up.

Quirks that checkpoints depend on: logits are scaled by the stage's width, C^-0.5, not by the width of a head; the
activation is QuickGELU; norms have eps 1e-5; only the final tokens are normed, not the stages' outputs. The dense form
(there is no published one) returns the raw maps of the three stages; the class token stays inside the last stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import Mlp, QuickGELU
from torch import Tensor, nn

from anyres.layers.attention import Block
from anyres.layers.init import init_linear
from anyres.layers.maps import ConvNorm
from anyres.layers.parts import parts_of
from anyres.layers.patch_embed import ConvEmbed
from anyres.layers.spatial_reduction import attend
from anyres.models._backbone import Family, Variant
from anyres.models._keys import TRANSFORMERS_BLOCK, KeyRule, Layout
from anyres.models._pyramid import Pyramid, Run, Stage, drop_path_rates
from anyres.options import Count, Depth, Factor, Rate, Three
from anyres.shapes import Grid


class ConvProjectionAttention(nn.Module):
    """Attention with convolutional projections (section 3.2, equation 2).

    Each of q, k and v is a linear layer after a depthwise 3x3 convolution and a batch norm, with stride 1 for q and 2
    for k and v. Prefix tokens skip the convolution and the norm.

    The three convolutions are separate because a single one for k and v (two filters per channel) has no fast kernel.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, num_heads)
        self.scale = dim**-0.5
        self.conv_proj_q = ConvNorm(dim, dim, 3, 1, groups=dim)
        self.conv_proj_k = ConvNorm(dim, dim, 3, 2, groups=dim)
        self.conv_proj_v = ConvNorm(dim, dim, 3, 2, groups=dim)
        self.proj_q = nn.Linear(dim, dim)
        self.proj_k = nn.Linear(dim, dim)
        self.proj_v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, prefix + h·w, C) of a grid → same shape."""
        prefix = x_BNC.shape[1] - grid[0] * grid[1]
        token, map_BHWC = x_BNC[:, :prefix], x_BNC[:, prefix:].unflatten(1, grid).contiguous()

        def project(conv: ConvNorm, linear: nn.Linear) -> Tensor:
            tokens = conv(map_BHWC).flatten(1, 2)
            return linear(torch.cat((token, tokens), dim=1) if prefix else tokens)

        q = project(self.conv_proj_q, self.proj_q)
        k = project(self.conv_proj_k, self.proj_k)
        v = project(self.conv_proj_v, self.proj_v)
        return self.proj(attend(q, k, v, self.num_heads, self.scale))


class CvTStage(Stage):
    """Embedding and blocks, with a class token in front of the tokens if `class_token` is set."""

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module], dim: int, class_token: bool) -> None:
        super().__init__(downsample, blocks)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor, extra: Tensor | None, run: Run) -> tuple[Tensor, Tensor | None]:
        x = self.downsample(x)
        grid = (x.shape[1], x.shape[2])
        tokens = x.flatten(1, 2)
        if self.cls_token is not None:
            tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), tokens), dim=1)
        for block in self.blocks:
            tokens = run(block, tokens, grid)
        if self.cls_token is None:
            return self.norm(tokens.unflatten(1, grid)), extra
        return self.norm(tokens[:, 1:].unflatten(1, grid)), tokens[:, :1]


class CvT(Pyramid):
    """CvT (section 3). The drop path rate rises within the last stage only."""

    reductions = (4, 8, 16)
    pools = ("token", "avg", "")
    no_decay = ("cls_token",)
    published_keys = (
        KeyRule("^stage{i}", "^stages.{i}"),
        KeyRule("^stages.{i}.patch_embed", "^stages.{i}.downsample"),
        *(KeyRule(f"conv_proj_{name}.bn", f"conv_proj_{name}.norm") for name in "qkv"),
    )
    layouts = (
        Layout(
            "transformers",
            "embedding.convolution_embeddings",
            (
                KeyRule("^encoder.stages.{i}", "^stage{i}"),
                KeyRule("embedding.convolution_embeddings.projection", "patch_embed.proj"),
                KeyRule("embedding.convolution_embeddings.normalization", "patch_embed.norm"),
                KeyRule("layers.{j}", "blocks.{j}"),
                *(
                    rule
                    for name in ("query", "key", "value")
                    for rule in (
                        KeyRule(f"attention.attention.projection_{name}", f"attn.proj_{name[0]}"),
                        KeyRule(
                            f"attention.attention.convolution_projection_{name}.convolution_projection",
                            f"attn.conv_proj_{name[0]}",
                        ),
                    )
                ),
                KeyRule("convolution", "conv"),
                KeyRule("normalization", "bn"),
                *TRANSFORMERS_BLOCK,
            ),
            prefix=("cvt.",),
        ),
    )

    def __init__(
        self,
        embed_dims: Three[Count] = (64, 192, 384),
        depths: Three[Depth] = (1, 2, 10),
        num_heads: Three[Count] = (1, 3, 6),
        mlp_ratio: Factor = 4.0,
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        **kwargs: Any,
    ) -> None:
        last = len(depths) - 1
        rates = [*([0.0] * depth for depth in depths[:-1]), *drop_path_rates(drop_path_rate, depths[-1:])]
        stages = [
            CvTStage(
                ConvEmbed(embed_dims[i - 1], dim, 3, 2, 1) if i else ConvEmbed(in_chans, dim, 7, 4, 2),
                [
                    Block(
                        dim,
                        ConvProjectionAttention(dim, num_heads[i]),
                        Mlp(dim, int(dim * mlp_ratio), act_layer=QuickGELU),
                        rate,
                        eps=1e-5,
                    )
                    for rate in rates[i]
                ],
                dim,
                class_token=i == last,
            )
            for i, dim in enumerate(embed_dims)
        ]
        super().__init__(stages, embed_dims, nn.LayerNorm(embed_dims[-1], eps=1e-5), in_chans=in_chans, **kwargs)
        self.minimum_size = 3
        self.apply(init_linear)

    def finish(self, x_BHWC: Tensor, extra: Tensor | None) -> Tensor:
        """Normed tokens (B, 1 + h·w, C), the class token first."""
        assert extra is not None
        return self.norm(torch.cat((extra, x_BHWC.flatten(1, 2)), dim=1))

    @classmethod
    def default_out_indices(cls, args: dict[str, Any]) -> tuple[int, ...]:
        return (0, 1, 2)


VARIANTS = {
    "cvt_13": Variant(
        published="cvt_13",
        args={},
        drop_path=0.1,
        top1={224: 81.6},
        notes="CvT-13. Files at 384 are the same network: 83.0 top-1 (ImageNet-1k), 83.3 (ImageNet-22k, then 1k); they "
        "were tested on squares of 384 without a crop.",
    ),
    "cvt_21": Variant(
        published="cvt_21",
        args={"depths": (1, 4, 16)},
        drop_path=0.1,
        top1={224: 82.5},
        notes="CvT-21. Files at 384 are the same network: 83.3 top-1 (ImageNet-1k), 84.9 (ImageNet-22k, then 1k); they "
        "were tested on squares of 384 without a crop.",
    ),
    "cvt_w24": Variant(
        published="cvt_w24",
        args={"embed_dims": (192, 768, 1024), "depths": (2, 2, 20), "num_heads": (3, 12, 16), "img_size": 384},
        drop_path=0.3,
        top1={384: 87.6},
        train_sizes=(384,),
        crop_pct=1.0,
        notes="CvT-W24, trained on ImageNet-22k and tuned at 384. 87.6 is the repository's number, the paper prints "
        "87.7. Tested on squares of 384 without a crop.",
    ),
}

CVT = Family(
    model=CvT,
    variants=VARIANTS,
    paper="CvT: Introducing Convolutions to Vision Transformers, ICCV 2021, arXiv 2103.15808",
    repository="microsoft/CvT",
    licence="MIT",
    size_policy="Any size from 3 up, as published: nothing stored depends on the size. The first embedding ignores the "
    "last row or column if a side is two more than a multiple of 4; later embeddings round up.",
    first_conv="stages.0.downsample.proj",
)
