"""CMT: a hybrid pyramid of blocks with a depthwise convolution, attention to a reduced map and an inverted residual.

A convolutional stem at half resolution, then four stages at strides 4, 8, 16, 32. Every block adds a depthwise 3x3
convolution (local perception unit), attends to keys and values from a strided depthwise reduction of the map with a
learned bias for each pair of query and key positions (lightweight attention), and ends with an inverted residual
feed-forward network with batch norms.

Paper: "CMT: Convolutional Neural Networks Meet Vision Transformers", Guo, Han, Wu, Tang, Chen, Wang, Xu, CVPR 2022,
arXiv 2107.06263. Published code and weights: ggjy/CMT.pytorch (MIT by its README; it has no licence file).

Any input size: the published code runs at a single square size that is a multiple of 32. Here the image is zero-padded
at the right and the bottom to a multiple of 4, and each later map is padded as its strided convolution requires. Sizes
therefore round up at every stage, no row or column is dropped, no position consists of padding alone, and all stages
have the same grid of keys, ceil(H / 32) x ceil(W / 32). The bias tables, stored for `img_size`, are resized bicubically
(as the paper promises, although its code does not): first the key axes, then the query axes, to the grid that the keys
tile; the result is then cropped to the map. A table has N·N' entries per head: 68 million in stage 1 at 800x1333.

Quirks that checkpoints depend on: batch norm comes after the GELU in the stem and the feed-forward networks; LayerNorms
have eps 1e-6 in blocks and 1e-5 in embeddings; all blocks of a stage share one bias table; the last map has no norm but
a 1280-wide 1x1 convolution with batch norm and SiLU, whose output `forward_features` returns (the dense form omits all
three).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.layers.attention import Block
from anyres.layers.init import init_linear
from anyres.layers.maps import ConvNorm, depthwise, fold_into, on_map, pad_to_multiple, to_map, to_nchw, with_residual
from anyres.layers.parameter_cache import cached_for_parameter
from anyres.layers.parts import parts_of
from anyres.layers.patch_embed import ConvEmbed
from anyres.layers.resample import resample_table
from anyres.layers.sizes import ceil_div, crop
from anyres.models._backbone import Family, Variant, pair
from anyres.models._keys import KeyRule
from anyres.models._pyramid import Pyramid, Run, Stage, drop_path_rates
from anyres.options import Count, Depth, Factor, PerStage, Rate, SideOrPair
from anyres.shapes import Grid


class StemEmbed(ConvEmbed):
    """The stem and the first patch embedding, (B, H, W, in_chans) → (B, ceil(H/4), ceil(W/4), dim).

    The stem repeats 3x3 convolution → GELU → batch norm three times, with strides 2, 1 and 1.
    """

    def __init__(self, in_chans: int, stem_dim: int, dim: int) -> None:
        super().__init__(stem_dim, dim, 2, 2)
        self.convs = nn.ModuleList(
            [nn.Conv2d(stem_dim if i else in_chans, stem_dim, 3, 1 if i else 2, 1) for i in range(3)]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(stem_dim) for _ in range(3)])

    def grid(self, height: int, width: int) -> Grid:
        return -(-height // 4), -(-width // 4)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x = to_nchw(pad_to_multiple(x_BHWC, 4))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(F.gelu(conv(x)))
        return super().forward(to_map(x))

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the third norm into the patch embedding, which has no padding. The others feed padded convolutions."""
        norm = self.norms[2]
        if isinstance(norm, nn.BatchNorm2d):
            scale, shift = affine(norm)
            assert self.proj.bias is not None
            self.proj.bias = nn.Parameter(self.proj.bias + self.proj.weight.sum((2, 3)) @ shift)
            self.proj.weight = nn.Parameter(self.proj.weight * scale[:, None, None])
            self.norms[2] = nn.Identity()


@cached_for_parameter(maximum=2)
def position_bias(table: Tensor, native: Grid, reduction: int, grid: Grid) -> Tensor:
    """Return the bias (1, heads, h·w, h'·w') of a grid from a stage's table (heads, N, N').

    The keys' grid has h' = ceil(h / reduction). `native` is the grid of keys that the table is stored for. The grid of
    queries is `reduction` times as large, both in the table and after resizing, and is then cropped to `grid`, so a key
    stays aligned with the queries that it was reduced from.
    """
    keys = (ceil_div(grid[0], reduction), ceil_div(grid[1], reduction))
    queries = (native[0] * reduction, native[1] * reduction)
    bias = resample_table(table.unflatten(2, native).unflatten(1, queries), keys)  # (heads, Hq, Wq, h', w')
    bias = resample_table(bias.permute(0, 3, 4, 1, 2), (keys[0] * reduction, keys[1] * reduction))
    return crop(bias, 3, grid).flatten(3).flatten(1, 2).transpose(1, 2).contiguous()[None]


class LightweightAttention(nn.Module):
    """Lightweight multi-head self-attention (section 3.2).

    Keys and values come from a depthwise convolution with kernel = stride = `reduction` and a batch norm; a bias is
    added to the scaled logits.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, num_heads)
        self.reduction = reduction
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.sr = ConvNorm(dim, dim, reduction, reduction, 0, dim, bias=True) if reduction > 1 else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor, bias: Tensor) -> Tensor:
        """Map (B, H, W, C) and bias (1, heads, N, N') → (B, H, W, C)."""
        source = self.sr(pad_to_multiple(x_BHWC, self.reduction))
        q, k, v = (
            linear(tokens).flatten(1, 2).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for linear, tokens in ((self.q, x_BHWC), (self.k, source), (self.v, source))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(out.transpose(1, 2).reshape(x_BHWC.shape))


class InvertedResidual(nn.Module):
    """Inverted residual feed-forward network (section 3.2).

    1x1 → GELU → norm, + depthwise 3x3 → GELU → norm, 1x1 → norm.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.dwconv = depthwise(hidden)
        self.norm2: nn.Module = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.norm3: nn.Module = nn.BatchNorm2d(dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x = on_map(self.norm1, F.gelu(self.fc1(x_BHWC)))
        x = on_map(self.norm2, F.gelu(with_residual(self.dwconv, x)))
        return on_map(self.norm3, self.fc2(x))

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the norms before and after fc2 into it.

        The first norm stays, because the depthwise convolution pads its output with zeros.
        """
        if isinstance(self.norm2, nn.BatchNorm2d) and isinstance(self.norm3, nn.BatchNorm2d):
            scale, shift = affine(self.norm2)
            self.fc2.bias = nn.Parameter(self.fc2.bias + self.fc2.weight @ shift)
            self.fc2.weight = nn.Parameter(self.fc2.weight * scale)
            fold_into(self.fc2, self.norm3)
            self.norm2, self.norm3 = nn.Identity(), nn.Identity()


class CMTBlock(Block):
    """Local perception unit x ← x + DWConv(x), then a pre-norm block of attention and MLP (equations 1 to 6)."""

    def __init__(self, dim: int, num_heads: int, reduction: int, mlp_ratio: float, drop_path: float) -> None:
        attn = LightweightAttention(dim, num_heads, reduction)
        super().__init__(dim, attn, InvertedResidual(dim, int(dim * mlp_ratio)), drop_path)
        self.local = depthwise(dim)

    def forward(self, x_BHWC: Tensor, *context: Any) -> Tensor:
        return super().forward(with_residual(self.local, x_BHWC), *context)


class CMTStage(Stage):
    """Embedding and blocks that share one table of position biases, stored for the grid of keys `native`."""

    def __init__(
        self, downsample: nn.Module, blocks: Iterable[nn.Module], num_heads: int, reduction: int, native: Grid
    ) -> None:
        super().__init__(downsample, blocks)
        self.reduction = reduction
        self.native = native
        keys = native[0] * native[1]
        self.relative_pos = nn.Parameter(torch.randn(num_heads, keys * reduction**2, keys))

    def forward(self, x: Tensor, extra: Tensor | None, run: Run) -> tuple[Tensor, Tensor | None]:
        x = self.downsample(x)
        bias = position_bias(self.relative_pos, self.native, self.reduction, (x.shape[1], x.shape[2]))
        for block in self.blocks:
            x = run(block, x, bias)
        return self.norm(x), extra


class HeadConv(nn.Module):
    """1x1 convolution → batch norm → SiLU, at every position of the last map."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, head_dim)
        self.bn: nn.Module = nn.BatchNorm2d(head_dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return F.silu(on_map(self.bn, self.fc(x_BHWC)))

    def fold(self) -> None:
        if isinstance(self.bn, nn.BatchNorm2d):
            fold_into(self.fc, self.bn)
            self.bn = nn.Identity()


class CMT(Pyramid):
    """CMT (section 3)."""

    averaged = True
    published_keys = (
        *(
            rule
            for i, letter in enumerate("abcd")
            for rule in (
                KeyRule(f"^relative_pos_{letter}", f"^stages.{i}.relative_pos"),
                KeyRule(f"^patch_embed_{letter}", f"^stages.{i}.downsample"),
                KeyRule(f"^blocks_{letter}.{{j}}", f"^stages.{i}.blocks.{{j}}"),
            )
        ),
        KeyRule("^stem_conv{i+1}", "^stages.0.downsample.convs.{i}"),
        KeyRule("^stem_norm{i+1}", "^stages.0.downsample.norms.{i}"),
        KeyRule("blocks.{j}.proj", "blocks.{j}.local"),
        KeyRule("attn.sr.0", "attn.sr.conv"),
        KeyRule("attn.sr.1", "attn.sr.norm"),
        KeyRule("mlp.conv1.0", "mlp.fc1", "conv"),
        KeyRule("mlp.conv1.2", "mlp.norm1"),
        KeyRule("mlp.proj", "mlp.dwconv"),
        KeyRule("mlp.proj_bn", "mlp.norm2"),
        KeyRule("mlp.conv2.0", "mlp.fc2", "conv"),
        KeyRule("mlp.conv2.1", "mlp.norm3"),
        KeyRule("^_fc", "^norm.fc", "conv"),
        KeyRule("^_bn", "^norm.bn"),
    )

    def __init__(
        self,
        embed_dims: PerStage[Count] = (64, 128, 256, 512),
        depths: PerStage[Depth] = (3, 3, 16, 3),
        num_heads: PerStage[Count] = (1, 2, 4, 8),
        reductions: PerStage[Count] = (8, 4, 2, 1),
        stem_dim: Count = 32,
        head_dim: Count = 1280,
        mlp_ratio: Factor = 4.0,
        img_size: SideOrPair = 224,
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        dense: bool = False,
        **kwargs: Any,
    ) -> None:
        rates = drop_path_rates(drop_path_rate, depths)
        height, width = pair(img_size)
        native = (-(-height // 32), -(-width // 32))
        stages = [
            CMTStage(
                ConvEmbed(embed_dims[i - 1], dim, 2, 2, pad=True) if i else StemEmbed(in_chans, stem_dim, dim),
                [CMTBlock(dim, num_heads[i], reductions[i], mlp_ratio, rate) for rate in rates[i]],
                num_heads[i],
                reductions[i],
                native,
            )
            for i, dim in enumerate(embed_dims)
        ]
        norm = HeadConv(embed_dims[-1], head_dim)
        super().__init__(stages, embed_dims, norm, img_size=img_size, in_chans=in_chans, dense=dense, **kwargs)
        if not dense:
            self.num_features = self.head_hidden_size = head_dim
            self.reset_classifier(self.num_classes)
        self.minimum_size = 1
        init_published(self)

    def fit_tables(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize tables stored for another square native size, as in a forward pass."""
        resized = {}
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, CMTStage)
            name = f"stages.{i}.relative_pos"
            table = state.get(name)
            if table is None or table.shape == stage.relative_pos.shape:
                continue
            side = math.isqrt(table.shape[2])
            if table.shape[1:] == ((side * stage.reduction) ** 2, side**2):
                grid = (stage.native[0] * stage.reduction, stage.native[1] * stage.reduction)
                resized[name] = position_bias(table, (side, side), stage.reduction, grid)[0]
        return resized


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift, (C,) each, of a batch norm in evaluation: x·scale + shift."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def init_published(model: nn.Module) -> None:
    """Initialise linear layers as in ViT and convolutions as published.

    All convolutions, including depthwise ones and those implemented as linear layers, are normal with σ = √(2 /
    (C_out·k²)) and have zero biases.
    """
    for name, layer in model.named_modules():
        init_linear(layer)
        if isinstance(layer, nn.Conv2d) or name.endswith(("mlp.fc1", "mlp.fc2", "norm.fc")):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.weight[:, 0].numel()))
            nn.init.zeros_(layer.bias)


VARIANTS = {
    f"cmt_{size}": Variant(
        published=f"cmt_{short}",
        args={
            "embed_dims": widths,
            "depths": depths,
            "stem_dim": stem,
            "mlp_ratio": ratio,
            "img_size": side,
            "drop_rate": drop,
        },
        drop_path=drop_path,
        top1={side: top1},
        train_sizes=(side,),
    )
    for size, short, widths, depths, stem, ratio, side, drop, drop_path, top1 in (
        ("tiny", "ti", (46, 92, 184, 368), (2, 2, 10, 2), 16, 3.6, 160, 0.1, 0.1, 79.0),
        ("xsmall", "xs", (52, 104, 208, 416), (3, 3, 12, 3), 16, 3.77, 192, 0.1, 0.08, 81.8),
        ("small", "s", (64, 128, 256, 512), (3, 3, 16, 3), 32, 4.0, 224, 0.1, 0.1, 83.5),
        ("base", "b", (76, 152, 304, 608), (4, 4, 20, 4), 38, 4.0, 256, 0.3, 0.25, 84.5),
    )
}

CMT_FAMILY = Family(
    model=CMT,
    variants=VARIANTS,
    paper="CMT: Convolutional Neural Networks Meet Vision Transformers, CVPR 2022, arXiv 2107.06263",
    repository="ggjy/CMT.pytorch",
    licence="MIT",
    size_policy="Any size: sizes round up at every stage, with zero padding at the right and bottom. Position biases "
    "between query and key grids are resized bicubically.",
    first_conv="stages.0.downsample.convs.0",
)
