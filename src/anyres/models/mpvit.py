"""MPViT: several token maps of one resolution with growing receptive fields, each with its own transformer.

Every stage runs a chain of depthwise-separable 3x3 convolutions and passes the map after each of them (receptive fields
of 3x3, 5x5, 7x7) to its own transformer path. A convolutional branch captures details, and a 1x1 convolution fuses all
of them. Attention is factorised as in CoaT: a softmax of the keys over the tokens, a small context matrix per head, and
a depthwise convolution of the values as relative position encoding, so its cost is linear in the number of tokens.

Paper: "MPViT: Multi-Path Vision Transformer for Dense Prediction", Lee, Kim, Willette, Hwang, CVPR 2022,
arXiv 2112.11010. Published code and weights: youngwanLEE/MPViT (GPL-3.0, or commercial from ETRI).

Any input size: as published. Sizes round up at every stride, and there are no tables or windows; the zero padding of
the convolutions is the only border effect.

Quirks that checkpoints depend on: a stage's map has the next stage's width; the two position convolutions belong to a
path and are shared by all its layers (published files contain copies in every layer); the scale of the logits
multiplies the context term only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.layers.attention import Block
from anyres.layers.init import init_linear, init_linear_and_convolution
from anyres.layers.maps import ConvNorm, depthwise, fold_into, on_map, with_residual
from anyres.layers.parts import parts_of
from anyres.models._backbone import DetectorForm, Family, Variant
from anyres.models._keys import KeyRule
from anyres.models._pyramid import Pyramid, Run, drop_path_rates
from anyres.options import Count, Depth, PerStage, Rate
from anyres.shapes import Grid

HEADS = 8
WINDOWS = {3: 2, 5: 3, 7: 3}
"""Kernel side of the relative position encoding → number of heads that use it, in the order of the heads."""


class PointwiseNorm(nn.Module):
    """A 1x1 convolution without bias, written as a linear layer, and a batch norm that `fold` fuses into it."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Linear(in_dim, dim, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        nn.init.normal_(self.conv.weight, std=math.sqrt(2 / dim))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return on_map(self.norm, self.conv(x_BHWC))

    def fold(self) -> None:
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_into(self.conv, self.norm)
            self.norm = nn.Identity()


class Stem(nn.Sequential):
    """Two 3x3 convolutions of stride 2: (B, H, W, in_chans) → (B, H/4, W/4, dim), rounded up."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(ConvNorm(in_chans, dim // 2, 3, 2), ConvNorm(dim // 2, dim, 3, 2))
        self.apply(init_linear_and_convolution)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        for layer in self:
            x_BHWC = F.hardswish(layer(x_BHWC))
        return x_BHWC


class PatchEmbed(nn.Module):
    """One step of the multi-scale patch embedding (section 3.2): depthwise 3x3, pointwise, batch norm, Hardswish."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.depthwise = depthwise(dim, 3, stride, bias=False)
        self.pointwise = PointwiseNorm(dim, dim)
        nn.init.normal_(self.depthwise.weight, std=math.sqrt(2 / (9 * dim)))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return F.hardswish(self.pointwise(on_map(self.depthwise, x_BHWC)))


class LocalBranch(nn.Module):
    """The convolutional branch (section 3.3): x + pointwise(depthwise(pointwise(x)))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = PointwiseNorm(dim, dim)
        self.depthwise = ConvNorm(dim, dim, 3, groups=dim)
        self.conv2 = PointwiseNorm(dim, dim)
        self.depthwise.apply(init_linear_and_convolution)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        y = F.hardswish(self.depthwise(F.hardswish(self.conv1(x_BHWC))))
        return x_BHWC + self.conv2(y)


class FactorisedAttention(nn.Module):
    """Factorised attention with convolutional relative positions (CoaT, section 3.2).

    The output is q (softmax_N(k)ᵀ v) / √d + q * conv(v).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = (dim // HEADS) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor, position: RelativePosition) -> Tensor:
        """(B, H, W, C) → the same; `position` is the path's encoding, applied to the values."""
        q_BHWC, k_BHWC, v_BHWC = self.qkv(x_BHWC).chunk(3, dim=-1)
        k_BCN = k_BHWC.flatten(1, 2).mT.softmax(dim=-1)  # over the tokens, which is fast if they are the last axis
        q, v = (part.flatten(1, 2).unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (q_BHWC, v_BHWC))
        context = k_BCN.unflatten(1, (HEADS, -1)) @ v  # (B, heads, d, d)
        factor = (q @ (context * self.scale)).transpose(1, 2).reshape(x_BHWC.shape)
        return self.proj(factor + q_BHWC * position(v_BHWC))


class RelativePosition(nn.Module):
    """Depthwise convolutions of 3x3, 5x5 and 7x7 for groups of heads, shared by the layers of a path."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        head = dim // HEADS
        self.conv_list = nn.ModuleList([depthwise(heads * head, side) for side, heads in WINDOWS.items()])

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) → the same."""
        head = x_BHWC.shape[-1] // HEADS
        parts = x_BHWC.split([heads * head for heads in WINDOWS.values()], dim=-1)
        return torch.cat([on_map(conv, part) for conv, part in zip(self.conv_list, parts, strict=True)], dim=-1)


class Path(nn.Module):
    """One path's transformer, (B, H, W, C) → (B, H, W, C), with the position encoding before every layer."""

    def __init__(self, dim: int, mlp_ratio: int, rates: Sequence[float]) -> None:
        super().__init__()
        self.cpe = depthwise(dim)
        self.crpe = RelativePosition(dim)
        self.blocks = nn.ModuleList(
            Block(dim, FactorisedAttention(dim), Mlp(dim, dim * mlp_ratio), rate) for rate in rates
        )
        self.apply(init_linear)

    def forward(self, x_BHWC: Tensor, run: Run) -> Tensor:
        for block in self.blocks:
            x_BHWC = run(block, with_residual(self.cpe, x_BHWC), self.crpe)
        return x_BHWC


class MultiPathStage(nn.Module):
    """Multi-scale patch embedding, parallel paths and local branch, and their fusion (figure 2).

    The first stage comes after the stem and does not downsample itself.
    """

    def __init__(
        self, stem: Stem | None, dim: int, out_dim: int, paths: int, mlp_ratio: int, rates: Sequence[float]
    ) -> None:
        super().__init__()
        self.stem: nn.Module = nn.Identity() if stem is None else stem
        self.embeds = nn.ModuleList(PatchEmbed(dim, 1 if i or stem is not None else 2) for i in range(paths))
        self.local = LocalBranch(dim)
        self.paths = nn.ModuleList(Path(dim, mlp_ratio, rates) for _ in range(paths))
        self.aggregate = PointwiseNorm((paths + 1) * dim, out_dim)
        self.norm = nn.Identity()

    def grid(self, height: int, width: int) -> Grid:
        stride = 4 if isinstance(self.stem, Stem) else 2
        return -(-height // stride), -(-width // stride)

    def forward(self, x: Tensor, extra: Tensor | None, run: Run) -> tuple[Tensor, Tensor | None]:
        x = self.stem(x)
        outputs = []
        for i, (embed, path) in enumerate(zip(self.embeds, self.paths, strict=True)):
            x = embed(x)
            if i == 0:
                outputs.append(self.local(x))
            outputs.append(path(x, run))
        return self.norm(F.hardswish(self.aggregate(torch.cat(outputs, dim=-1)))), extra


_SHARED = re.compile(r"(.*\.mhca_blks\.\d+\.)(c(?:pe|rpe)\..*)")
_COPY = re.compile(r"\.MHCA_layers\.\d+\.(?:factoratt_crpe\.crpe|cpe|crpe)\.")


class MPViT(Pyramid):
    """MPViT (section 3). The dense form is the same network without a head."""

    detector = DetectorForm("detectron2")
    published_keys = (
        KeyRule("^cls_head.cls", "^head"),
        KeyRule("^stem.{i}", "^stages.0.stem.{i}"),
        KeyRule("^patch_embed_stages.{i}.patch_embeds.{j}", "^stages.{i}.embeds.{j}"),
        KeyRule("patch_conv.dwconv", "depthwise"),
        KeyRule("patch_conv.pwconv", "pointwise.conv", unit_axes="conv"),
        KeyRule("patch_conv.bn", "pointwise.bn"),
        KeyRule("^mhca_stages.{i}.mhca_blks.{j}", "^stages.{i}.paths.{j}"),
        KeyRule("MHCA_layers.{i}", "blocks.{i}"),
        KeyRule("factoratt_crpe", "attn"),
        KeyRule("cpe.proj", "cpe"),
        KeyRule("^mhca_stages.{i}.InvRes", "^stages.{i}.local"),
        KeyRule("local.conv1.conv", "local.conv1.conv", unit_axes="conv"),
        KeyRule("local.conv2.conv", "local.conv2.conv", unit_axes="conv"),
        KeyRule("local.dwconv", "local.depthwise.conv"),
        KeyRule("local.norm", "local.depthwise.bn"),
        KeyRule("^mhca_stages.{i}.aggregate", "^stages.{i}.aggregate"),
        KeyRule("aggregate.conv", "aggregate.conv", unit_axes="conv"),
        KeyRule("bn", "norm"),
    )

    def __init__(
        self,
        embed_dims: PerStage[Count] = (64, 96, 176, 216),
        depths: PerStage[Depth] = (1, 2, 4, 1),
        paths: PerStage[Count] = (2, 3, 3, 3),
        mlp_ratio: Count = 2,
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        **kwargs: Any,
    ) -> None:
        for dim in embed_dims:
            parts_of(dim, HEADS)
        widths = (*embed_dims[1:], embed_dims[-1])
        rates = drop_path_rates(drop_path_rate, depths)
        stages = [
            MultiPathStage(Stem(in_chans, dim) if i == 0 else None, dim, widths[i], paths[i], mlp_ratio, rates[i])
            for i, dim in enumerate(embed_dims)
        ]
        super().__init__(stages, widths, None, in_chans=in_chans, **kwargs)
        self.minimum_size = 1

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group layers by depth; the layers of a stage's parallel paths count as equally deep."""
        layers = [(r"^stages\.(\d+)\.paths\.\d+\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,))]
        return {"stem": r"^stages\.0\.stem", "blocks": r"^stages\.(\d+)" if coarse else layers}

    @classmethod
    def from_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep a tensor that all layers of a path share under the path's name, and drop the copies in the layers."""
        return super().from_published({name: tensor for name, tensor in state.items() if not _COPY.search(name)})

    @classmethod
    def to_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        published = super().to_published(state)
        layers = [name.removesuffix("norm1.weight") for name in published if name.endswith("norm1.weight")]
        for name, tensor in list(published.items()):
            if match := _SHARED.fullmatch(name):
                path, rest = match.groups()
                for layer in layers:
                    if layer.startswith(path):
                        published[layer + rest] = tensor
                        if rest.startswith("crpe"):
                            published[f"{layer}factoratt_crpe.{rest}"] = tensor
        return published


VARIANTS = {
    f"mpvit_{size}": Variant(
        published=f"mpvit_{size}",
        args={"embed_dims": dims, "depths": depths, "mlp_ratio": mlp_ratio},
        drop_path=drop_path,
        top1={224: top1},
    )
    for size, dims, depths, mlp_ratio, drop_path, top1 in (
        ("tiny", (64, 96, 176, 216), (1, 2, 4, 1), 2, 0.0, 78.2),
        ("xsmall", (64, 128, 192, 256), (1, 2, 4, 1), 4, 0.0, 80.9),
        ("small", (64, 128, 216, 288), (1, 3, 6, 3), 4, 0.05, 83.0),
        ("base", (128, 224, 368, 480), (1, 3, 8, 3), 4, 0.3, 84.3),
    )
}

FAMILY = Family(
    model=MPViT,
    variants=VARIANTS,
    paper="MPViT: Multi-Path Vision Transformer for Dense Prediction, CVPR 2022, arXiv 2112.11010",
    repository="youngwanLEE/MPViT",
    licence="GPL-3.0",
    size_policy="Any size, as published: every stride rounds up. Nothing stored depends on the size.",
    first_conv="stages.0.stem.0.conv",
)
