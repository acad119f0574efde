"""Swin: a pyramid with attention inside windows, which are shifted by half a window in every second block.

Four stages at strides 4, 8, 16, 32. Attention is limited to windows of MxM tokens, with a learned relative bias. Odd
blocks shift the windows cyclically, so that neighbouring windows exchange information, and mask pairs of tokens that
were not neighbours before the shift. Swin-MLP keeps this structure and mixes the tokens of a window with one learned
matrix per head instead.

Paper: "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", Liu, Lin, Cao, Hu, Wei, Zhang, Lin,
Guo, ICCV 2021, arXiv 2103.14030. Published code and weights: microsoft/Swin-Transformer (MIT).

Any input size. The classifier follows the published one at sizes where that runs, i.e. where each stage's map is a
multiple of M; no block of a stage shifts if a side of its map is at most M. At other sizes, the image is padded to a
multiple of 4, odd maps to even ones before merging, and the normed map of each block to whole windows, all at the right
and the bottom; padded keys are masked. If a side of the map is below M, the window is cropped to it and uses the small
offsets of the bias table. The dense form follows the published detectors at every size: every odd block shifts, and
padding, which after `qkv` equals that layer's bias, takes part in the attention. At 224 the two forms therefore differ
in the last stage. If `window_size` changes, the stored tables are resized bicubically when a checkpoint is loaded, as
published. Swin-MLP is the same in both forms: it pads with zeros, which its matrices mix in as published, and its M is
fixed.

Quirks that checkpoints depend on: every norm has eps 1e-5; merging concatenates its 2x2 cell column by column; Swin-MLP
shifts by padding M - M//2 rows and columns at the top and the left instead of rolling, and has no projection.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.layers.attention import Block
from anyres.layers.init import init_linear
from anyres.layers.maps import pad_to_multiple
from anyres.layers.parts import parts_of
from anyres.layers.patch_embed import ConvEmbed
from anyres.layers.resample import resample_table
from anyres.layers.sizes import is_below, known, narrow
from anyres.layers.windows import (
    PUBLISHED_TABLE,
    WindowAttention,
    merge,
    partition,
    tables_from_published,
    tables_to_published,
    window_rule,
)
from anyres.models._backbone import Family, Variant
from anyres.models._keys import TRANSFORMERS_BLOCK, KeyRule, Layout
from anyres.models._pyramid import Pyramid, Stage, drop_path_rates
from anyres.options import Count, Depth, Factor, PerStage, Rate
from anyres.shapes import Grid


class PatchMerging(nn.Module):
    """Merge 2x2 cells into one token of twice the width (section 3.1): concatenation, norm, linear layer.

    An odd side is padded by a row or column of zeros.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_dim, eps=1e-5)
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False)

    def grid(self, height: int, width: int) -> Grid:
        return (height + 1) // 2, (width + 1) // 2

    def forward(self, x_BHWC: Tensor) -> Tensor:
        B, H, W, C = x_BHWC.shape
        h, w = self.grid(H, W)
        # The cell's columns come before its rows.
        cells = pad_to_multiple(x_BHWC, 2).view(B, h, 2, w, 2, C).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(cells.reshape(B, h, w, 4 * C)))


def _from_openmmlab(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert what OpenMMLab orders otherwise: it concatenates a cell channel by channel, each with its rows before its
    columns. The last of the maps' norms is a classifier's own."""
    converted = {}
    for name, tensor in state.items():
        if ".downsample." in name and tensor.ndim and tensor.shape[-1] % 4 == 0:
            tensor = tensor.unflatten(-1, (-1, 2, 2)).movedim((-1, -2), (-3, -2)).flatten(-3)
        if name.startswith("norm3.") and "norm0.weight" not in state:
            name = name.replace("norm3", "norm")
        converted[name] = tensor
    return converted


class ShiftedWindowAttention(WindowAttention):
    """W-MSA, or SW-MSA if `shifted` (section 3.2), with windows chosen by the published rules for the current map."""

    def __init__(self, dim: int, num_heads: int, window_size: int, shifted: bool, dense: bool) -> None:
        super().__init__(dim, num_heads, window_size)
        self.window_size = window_size
        self.shifted = shifted
        self.dense = dense

    def forward(self, x_BHWC: Tensor) -> Tensor:  # type: ignore[override]
        """(B, H, W, C) → the same."""
        M = self.window_size
        grid = (x_BHWC.shape[1], x_BHWC.shape[2])
        window, shift = ((M, M), (M // 2, M // 2)) if self.dense else window_rule(grid, M)
        return super().forward(x_BHWC, window, shift if self.shifted else (0, 0), mask_padding=not self.dense)


class SwinTransformer(Pyramid):
    """Swin, version 1; `window_size` is M in all stages."""

    no_decay: tuple[str, ...] = ("bias_table",)
    published_keys: tuple[KeyRule, ...] = (
        KeyRule("^layers.{i}.blocks", "^stages.{i}.blocks"),
        KeyRule("^layers.{i}.downsample", "^stages.{i+1}.downsample"),
        KeyRule("^patch_embed", "^stages.0.downsample"),
        KeyRule("^norm{i}", "^out_norms.{i}"),
    )
    published_constants = ("relative_position_index", "attn_mask")
    layouts = (
        Layout(
            "timm",
            "layers.3.downsample",
            (KeyRule("^layers.{i+1}.downsample", "^layers.{i}.downsample"), KeyRule("^head.fc", "^head")),
        ),
        Layout(
            "transformers",
            "embeddings.patch_embeddings",
            (
                KeyRule("^embeddings.patch_embeddings.projection", "^patch_embed.proj"),
                KeyRule("^embeddings.norm", "^patch_embed.norm"),
                KeyRule("^encoder.layers.{i}", "^layers.{i}"),
                KeyRule(f"attention.self.{PUBLISHED_TABLE}", f"attn.{PUBLISHED_TABLE}"),
                KeyRule(f"attention.relative_position_bias.{PUBLISHED_TABLE}", f"attn.{PUBLISHED_TABLE}"),
                *TRANSFORMERS_BLOCK,
            ),
            prefix=("swin.",),
        ),
        Layout(
            "OpenMMLab",
            "attn.w_msa",
            (
                KeyRule("^patch_embed.projection", "^patch_embed.proj"),
                KeyRule("^stages.{i}", "^layers.{i}"),
                KeyRule("attn.w_msa", "attn"),
                KeyRule("ffn.layers.0.0", "mlp.fc1"),
                KeyRule("ffn.layers.1", "mlp.fc2"),
                KeyRule("^head.fc", "^head"),
            ),
            convert=_from_openmmlab,
        ),
    )

    def __init__(
        self,
        embed_dim: Count = 96,
        depths: PerStage[Depth] = (2, 2, 6, 2),
        num_heads: PerStage[Count] = (3, 6, 12, 24),
        window_size: Count = 7,
        mlp_ratio: Factor = 4.0,
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        dense: bool = False,
        **kwargs: Any,
    ) -> None:
        widths = [embed_dim * 2**i for i in range(len(depths))]
        rates = drop_path_rates(drop_path_rate, depths)

        def block(i: int, j: int) -> Block:
            dim = widths[i]
            attn = self.token_mixer(dim, num_heads[i], window_size, j % 2 == 1, dense)
            return Block(dim, attn, Mlp(dim, int(dim * mlp_ratio)), rates[i][j], eps=1e-5)

        stages = [
            Stage(
                PatchMerging(widths[i - 1], dim) if i else ConvEmbed(in_chans, dim, 4, 4, pad=True),
                [block(i, j) for j in range(depths[i])],
            )
            for i, dim in enumerate(widths)
        ]
        norm, *out_norms = (nn.LayerNorm(dim, eps=1e-5) for dim in (widths[-1], *widths))
        super().__init__(stages, widths, norm, out_norms, in_chans=in_chans, dense=dense, **kwargs)
        self.minimum_size = 1
        self.apply(init_linear)

    def token_mixer(self, dim: int, num_heads: int, window_size: int, shifted: bool, dense: bool) -> nn.Module:
        """Return the module that mixes the tokens in a block, (B, H, W, C) → the same."""
        return ShiftedWindowAttention(dim, num_heads, window_size, shifted, dense)

    @classmethod
    def from_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return tables_from_published(super().from_published(state))

    @classmethod
    def to_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().to_published(tables_to_published(state))

    def fit_tables(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize bias tables for another window size bicubically."""
        return {
            name: resample_table(state[name], (parameter.shape[1], parameter.shape[2]))
            for name, parameter in self.named_parameters()
            if name.endswith("bias_table") and name in state and state[name].shape != parameter.shape
        }


# Swin-MLP -------------------------------------------------------------------------------------------------------------


class WindowMixing(nn.Module):
    """Swin-MLP's replacement for attention: one matrix per head mixes the positions of a window.

    All channels of a head share its matrix, and there is no projection. The rows of `weight` (heads·M², M²) and `bias`
    (heads·M²) are head-major.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, shifted: bool) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, num_heads)
        self.window_size = window_size
        self.shifted = shifted
        self.weight = nn.Parameter(torch.empty(num_heads * window_size**2, window_size**2))
        self.bias = nn.Parameter(torch.zeros(num_heads * window_size**2))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) → the same.

        A shift first pads M - M//2 rows and columns of zeros at the top and the left; the map is then zero-padded at
        the bottom and the right to whole windows.
        """
        H, W, C = x_BHWC.shape[1:]
        M, heads = self.window_size, self.num_heads
        before = (M - M // 2) * (1 - is_below(H, M + 1)) * (1 - is_below(W, M + 1)) if self.shifted else 0
        if not known(before == 0):
            x_BHWC = F.pad(x_BHWC, (0, 0, before, 0, before, 0))
        x_BMC = partition(x_BHWC, (M, M))
        x_hNM = x_BMC.view(-1, M * M, heads, C // heads).permute(2, 1, 0, 3).flatten(2)
        mixed_hNM = torch.baddbmm(self.bias.view(heads, -1, 1), self.weight.view(heads, M * M, M * M), x_hNM)
        mixed_BMC = mixed_hNM.unflatten(2, (-1, C // heads)).permute(2, 1, 0, 3).reshape(x_BMC.shape)
        whole = merge(mixed_BMC, (H + before, W + before), (M, M))
        return narrow(narrow(whole, 1, before, H), 2, before, W).contiguous()


class SwinMLP(SwinTransformer):
    """Swin-MLP: the same pyramid without attention, with windows shifted by padding."""

    no_decay = ()
    published_keys = (*SwinTransformer.published_keys, KeyRule("spatial_mlp", "attn"))

    def token_mixer(self, dim: int, num_heads: int, window_size: int, shifted: bool, dense: bool) -> nn.Module:
        return WindowMixing(dim, num_heads, window_size, shifted)

    @classmethod
    def from_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert the mixing matrices, which are published as 1-wide convolutions (heads·M², M², 1)."""
        ours = super().from_published(state)
        return {name: t.flatten(1) if name.endswith("attn.weight") else t for name, t in ours.items()}

    @classmethod
    def to_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().to_published(
            {name: t[..., None] if name.endswith("attn.weight") else t for name, t in state.items()}
        )


def _variant(
    published: str, args: dict[str, Any], drop_path: float, top1: dict[int, float], size: int = 224, notes: str = ""
) -> Variant:
    window_size = int(published.partition("window")[2].partition("_")[0])
    return Variant(
        published=published,
        args={**args, "window_size": window_size, "img_size": size},
        drop_path=drop_path,
        top1=top1,
        train_sizes=(size,),
        crop_pct=1.0 if size == 384 else 224 / 256,
        notes=notes,
    )


_DEEP = {"depths": (2, 2, 18, 2)}
_BASE = {**_DEEP, "embed_dim": 128, "num_heads": (4, 8, 16, 32)}
_LARGE = {**_DEEP, "embed_dim": 192, "num_heads": (6, 12, 24, 48)}
_TINY_NOTE = "Pre-trained on ImageNet-22k and fine-tuned at 224 (swin_{}_patch4_window7_224_22kto1k): {} %."
_LARGE_NOTE = "Published only as pre-trained on ImageNet-22k and fine-tuned (swin_large_patch4_window{}_22kto1k)."
VARIANTS = {
    "swin_tiny": _variant("swin_tiny_patch4_window7_224", {}, 0.2, {224: 81.2}, notes=_TINY_NOTE.format("tiny", 80.9)),
    "swin_small": _variant(
        "swin_small_patch4_window7_224", _DEEP, 0.3, {224: 83.2}, notes=_TINY_NOTE.format("small", 83.2)
    ),
    "swin_base": _variant(
        "swin_base_patch4_window7_224", _BASE, 0.5, {224: 83.5}, notes=_TINY_NOTE.format("base", 85.2)
    ),
    "swin_base_384": _variant(
        "swin_base_patch4_window12_384",
        _BASE,
        0.5,
        {384: 84.5},
        384,
        "Fine-tuned from swin_base. From ImageNet-22k (swin_base_patch4_window12_384_22kto1k): 86.4 %.",
    ),
    "swin_large": _variant(
        "swin_large_patch4_window7_224", _LARGE, 0.2, {224: 86.3}, notes=_LARGE_NOTE.format("7_224")
    ),
    "swin_large_384": _variant(
        "swin_large_patch4_window12_384", _LARGE, 0.2, {384: 87.3}, 384, _LARGE_NOTE.format("12_384")
    ),
    "swin_tiny_c24_256": _variant(
        "swin_tiny_c24_patch4_window8_256", {"num_heads": (4, 8, 16, 32)}, 0.2, {256: 81.6}, 256
    ),
}
MLP_VARIANTS = {
    "swin_mlp_tiny_c24_256": _variant(
        "swin_mlp_tiny_c24_patch4_window8_256", {"num_heads": (4, 8, 16, 32)}, 0.2, {256: 79.4}, 256
    ),
    "swin_mlp_tiny_c12_256": _variant(
        "swin_mlp_tiny_c12_patch4_window8_256", {"num_heads": (8, 16, 32, 64)}, 0.2, {256: 79.6}, 256
    ),
    "swin_mlp_tiny_c6_256": _variant(
        "swin_mlp_tiny_c6_patch4_window8_256", {"num_heads": (16, 32, 64, 128)}, 0.2, {256: 79.7}, 256
    ),
    "swin_mlp_base": _variant("swin_mlp_base_patch4_window7_224", _BASE, 0.5, {224: 81.3}),
}

_PAPER = "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021, arXiv 2103.14030"
FAMILY = Family(
    model=SwinTransformer,
    variants=VARIANTS,
    paper=_PAPER,
    repository="microsoft/Swin-Transformer",
    licence="MIT",
    size_policy="Any size: maps are padded to whole windows after each norm, with a mask in the classifier and without "
    "one in the dense form, as published. The classifier does not shift windows on maps no larger than a window.",
    first_conv="stages.0.downsample.proj",
)
MLP_FAMILY = Family(
    model=SwinMLP,
    variants=MLP_VARIANTS,
    paper=_PAPER,
    repository="microsoft/Swin-Transformer",
    licence="MIT",
    size_policy="Any size: maps are zero-padded to whole windows after each norm. Blocks do not shift windows on maps "
    "no larger than a window.",
    first_conv="stages.0.downsample.proj",
)
