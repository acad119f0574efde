"""Dynamic spatial sparsification: DynamicViT's score predictors on hierarchical hosts, ConvNeXt and Swin.

The map of a hierarchical network must stay complete, so positions with low scores go through one linear layer (fast
path) while the others go through the feed-forward network (slow path). At test time, the best-scoring share of the
positions takes the slow path (`keep_ratio`); in training, the choice is sampled. Both are in `layers/sparsify.py`.

Paper: "Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional Neural Networks", Rao, Liu,
Zhao, Zhou, Lu, TPAMI 2023, arXiv 2207.01580. Published code and weights: raoyongming/DynamicViT (MIT).

Any input size: the shares refer to the positions of the current map. ConvNeXt rounds down at every stage, as published;
Swin behaves as in swin.py.

Quirks that checkpoints depend on: counts are rounded down in floating point; the share falls by 0.2 from each predictor
to the next, and each predictor decides anew over all positions.

One file, though long: two hosts share the sparse stages of one paper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from anyres.layers.attention import Block
from anyres.layers.init import init_linear
from anyres.layers.maps import conv_grid, depthwise, on_map
from anyres.layers.patch_embed import ConvEmbed
from anyres.layers.sparsify import (
    ScorePredictor,
    check_places,
    decide,
    flat_rows,
    keep_count,
    keep_mask,
    merge,
    split_by_score,
    two_paths,
)
from anyres.layers.windows import tables_from_published, tables_to_published
from anyres.models._backbone import Family
from anyres.models._keys import KeyRule
from anyres.models._pyramid import Pyramid, Run, Stage, drop_path_rates
from anyres.models.dynamicvit import check_ratio, predictor_keys, variant
from anyres.models.swin import PatchMerging, ShiftedWindowAttention, SwinTransformer
from anyres.options import Count, Depth, PerStage, Rate, WholeNumber
from anyres.shapes import Grid


class SparseStage(Stage):
    """A stage whose blocks have two paths from the first one in `prune_before` on.

    These are `TwoPathBlock`s. A predictor decides over all positions for all blocks up to the next predictor. The stage
    returns the keep masks (B, predictors, N) as the map's companion.
    """

    def __init__(
        self, stage: Stage, dim: int, prune_before: Sequence[int], keep_ratios: Sequence[float], eps: float
    ) -> None:
        super().__init__(stage.downsample, stage.blocks)
        self.prune_before = check_places(prune_before, len(stage.blocks))
        self.keep_ratios = tuple(keep_ratios)
        self.predictors = nn.ModuleList(ScorePredictor(dim, eps) for _ in self.prune_before)

    def forward(self, x: Tensor, extra: Tensor | None, run: Run) -> tuple[Tensor, Tensor | None]:
        x = self.downsample(x)
        for block in self.blocks[: self.prune_before[0]]:
            x = run(block, x)
        x, decisions = self.sample(x, run) if self.training else self.select(x, run)
        return self.norm(x), decisions

    def spans(self) -> Iterator[tuple[nn.Module, float, Any]]:
        """Yield each predictor, its share, and the blocks that it decides for."""
        ends = (*self.prune_before[1:], len(self.blocks))
        for predictor, ratio, start, end in zip(
            self.predictors, self.keep_ratios, self.prune_before, ends, strict=True
        ):
            yield predictor, ratio, self.blocks[start:end]

    def select(self, x: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Run the stage in evaluation: one map, with a top-k choice."""
        N = x.shape[1] * x.shape[2]
        decisions = []
        for predictor, ratio, blocks in self.spans():
            score = predictor(x.flatten(1, 2))[..., 0]
            slow, fast = split_by_score(score, keep_count(N, ratio))
            rows = flat_rows(slow, N), flat_rows(fast, N)
            for block in blocks:
                x = run(block, x, None, rows)
            decisions.append(keep_mask(slow, N))
        return x, torch.stack(decisions, dim=1)

    def sample(self, x: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Run the stage in training: two maps, with sampled decisions.

        A position that changes paths continues with the other map's history.
        """
        slow = fast = x
        decisions = []
        for predictor, _, blocks in self.spans():
            decisions.append(decide(predictor(x.flatten(1, 2))))
            keep = decisions[-1].view(*x.shape[:-1], 1)
            for block in blocks:
                slow, fast = run(block, slow, fast, keep)
            x = merge(keep, slow, fast)
        return x, torch.stack(decisions, dim=1)


class TwoPathBlock(nn.Module, ABC):
    """A block of a `SparseStage`, with a slow and a fast path."""

    def forward(self, slow: Tensor, fast: Tensor | None, choice: Any) -> Any:
        """Run the block on one map in evaluation, or on two maps in training.

        In evaluation, `slow` is the map (B, h, w, C), `fast` is None and `choice` is its (slow rows, fast rows);
        returns the map. In training, all positions of `slow` took the slow path and all of `fast` the fast path, and
        `choice` is the keep mask (B, h, w, 1); returns both maps.
        """
        return self.split(slow, *choice) if fast is None else self.both(slow, fast, choice)

    @abstractmethod
    def split(self, x: Tensor, slow_rows: Tensor, fast_rows: Tensor) -> Tensor: ...

    @abstractmethod
    def both(self, slow: Tensor, fast: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]: ...


class DynamicPyramid(Pyramid):
    """Base of the hierarchical hosts; the third of the four stages is a `SparseStage`."""

    @property
    def keep_ratios(self) -> tuple[float, ...]:
        """Share of positions on the slow path after each predictor."""
        stage = self.stages[2]
        return stage.keep_ratios if isinstance(stage, SparseStage) else ()

    def forward_train(self, x: Tensor, targets: Sequence[str] = ("cls",)) -> dict[str, Tensor]:
        """Add "map", the normed last map (B, h, w, C), to the outputs.

        A model with predictors also adds "decisions", their keep masks (B, predictors, N).
        """
        *_, (last, decisions) = self.forward_stages(x)
        features = self.finish(last, decisions)
        pooled = self.pool(features)
        logits = self.head(self.head_drop(pooled))
        out = {"logits": logits, "cls": pooled, "map": self.norm(last)}
        if "gap" in targets:
            out["gap"] = self.mean_patch(out["map"])
        if decisions is not None:
            out["decisions"] = decisions
        return out


def spatial_ratios(keep_ratio: float, predictors: int) -> tuple[float, ...]:
    """Return the share of positions on the slow path after each predictor: 0.2 less every time, as published."""
    check_ratio(keep_ratio, 0.2 * (predictors - 1))
    return tuple(keep_ratio - 0.2 * i for i in range(predictors))


# ConvNeXt


class NormConv(nn.Module):
    """ConvNeXt's downsampling at the start of a stage: LayerNorm, then a 2x2 convolution of stride 2."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(in_dim, eps=1e-6)
        self.reduction = nn.Conv2d(in_dim, dim, 2, 2)

    def grid(self, height: int, width: int) -> Grid:
        return conv_grid(self.reduction, height, width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return on_map(self.reduction, self.input_norm(x_BHWC))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, LayerNorm, feed-forward network and layer scale, with a residual connection."""

    def __init__(self, dim: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.dwconv = depthwise(dim, 7)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def slow(self, y: Tensor) -> Tensor:
        return self.gamma * self.mlp(self.norm(y))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.slow(on_map(self.dwconv, x)))


class SparseConvNeXtBlock(TwoPathBlock, ConvNeXtBlock):  # type: ignore[misc]  # its forward has other arguments
    """ConvNeXt's block with a fast path as an alternative to the feed-forward network."""

    def __init__(self, dim: int, drop_path: float = 0.0) -> None:
        super().__init__(dim, drop_path)
        self.fast_norm = nn.LayerNorm(dim, eps=1e-6)
        self.fast_linear = nn.Linear(dim, dim)
        self.fast_gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def fast(self, y: Tensor) -> Tensor:
        return self.fast_gamma * self.fast_linear(self.fast_norm(y))

    def split(self, x: Tensor, slow_rows: Tensor, fast_rows: Tensor) -> Tensor:
        y = on_map(self.dwconv, x)
        return x + self.drop_path(two_paths(y, slow_rows, fast_rows, self.slow, self.fast))

    def both(self, slow: Tensor, fast: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Each path sees the merged map at its own positions and its own map elsewhere."""
        y = on_map(self.dwconv, merge(keep, slow, fast))
        return (
            slow + self.drop_path(self.slow(merge(keep, y, slow))),
            fast + self.drop_path(self.fast(merge(keep, fast, y))),
        )


def init_convnext(module: nn.Module) -> None:
    """Initialise convolutions and linear layers with a truncated normal (σ = 0.02) and zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class DynamicConvNeXt(DynamicPyramid):
    """ConvNeXt with spatial sparsification ("DynamicCNN").

    Args:
        keep_ratio: share of the third stage's positions on the slow path after the first predictor; it is 0.2 less
            after the second and 0.4 less after the third.
        prune_before: the blocks of the third stage that have a predictor before them; an empty list gives plain
            ConvNeXt, the teacher in training.
    """

    published_keys = (
        KeyRule("^downsample_layers.0.0", "^stages.0.downsample.proj"),
        KeyRule("^downsample_layers.0.1", "^stages.0.downsample.norm"),
        KeyRule("^downsample_layers.{i}.0", "^stages.{i}.downsample.input_norm"),
        KeyRule("^downsample_layers.{i}.1", "^stages.{i}.downsample.reduction"),
        KeyRule("^stages.{i}.{j}", "^stages.{i}.blocks.{j}"),
        KeyRule("pwconv1", "mlp.fc1"),
        KeyRule("pwconv2", "mlp.fc2"),
        KeyRule("fast_path.0", "fast_norm"),
        KeyRule("fast_path.1", "fast_linear"),
        KeyRule("fast_path_gamma", "fast_gamma"),
        KeyRule("^norm{i}", "^out_norms.{i}"),
        *predictor_keys("score_predictor", "stages.2.predictors", "conv"),
    )

    def __init__(
        self,
        keep_ratio: float = 0.7,
        prune_before: Sequence[WholeNumber] = (1, 2, 3),
        depths: PerStage[Depth] = (3, 3, 9, 3),
        embed_dims: PerStage[Count] = (96, 192, 384, 768),
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        **kwargs: Any,
    ) -> None:
        rates = drop_path_rates(drop_path_rate, depths)

        def block(i: int, j: int) -> ConvNeXtBlock:
            sparse = i == 2 and prune_before and j >= prune_before[0]
            return (SparseConvNeXtBlock if sparse else ConvNeXtBlock)(embed_dims[i], rates[i][j])

        stages = [
            Stage(
                NormConv(embed_dims[i - 1], dim) if i else ConvEmbed(in_chans, dim, 4, 4, eps=1e-6),
                [block(i, j) for j in range(depths[i])],
            )
            for i, dim in enumerate(embed_dims)
        ]
        if prune_before:
            ratios = spatial_ratios(keep_ratio, len(prune_before))
            stages[2] = SparseStage(stages[2], embed_dims[2], prune_before, ratios, eps=1e-6)
        norm, *out_norms = (nn.LayerNorm(dim, eps=1e-6) for dim in (embed_dims[-1], *embed_dims))
        super().__init__(stages, embed_dims, norm, out_norms, in_chans=in_chans, **kwargs)
        self.minimum_size = 32
        self.apply(init_convnext)

    def finish(self, x_BHWC: Tensor, extra: Tensor | None) -> Tensor:
        """Return the last map unchanged: ConvNeXt's norm comes after the mean."""
        return x_BHWC

    def pool(self, features: Tensor) -> Tensor:
        return self.norm(super().pool(features))


# Swin


class SparseSwinBlock(TwoPathBlock, Block):
    """Swin's block with a fast path as an alternative to the MLP; attention always takes the complete map."""

    def __init__(self, dim: int, attn: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__(dim, attn, Mlp(dim, 4 * dim), drop_path, eps=1e-5)
        self.fast_norm = nn.LayerNorm(dim, eps=1e-5)
        self.fast_linear = nn.Linear(dim, dim)

    def slow(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))

    def fast(self, x: Tensor) -> Tensor:
        return self.fast_linear(self.fast_norm(x))

    def split(self, x: Tensor, slow_rows: Tensor, fast_rows: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(two_paths(x, slow_rows, fast_rows, self.slow, self.fast))

    def both(self, slow: Tensor, fast: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Both maps continue from the merged one, unlike in ConvNeXt."""
        x = merge(keep, slow, fast)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return (
            x + self.drop_path2(self.slow(merge(keep, x, slow))),
            x + self.drop_path2(self.fast(merge(keep, fast, x))),
        )


class DynamicSwin(DynamicPyramid):
    """Swin with spatial sparsification ("DynamicSwin") and 7x7 windows; arguments as in `DynamicConvNeXt`."""

    no_decay = ("bias_table",)
    published_keys = (
        *predictor_keys("layers.2.score_predictor", "stages.2.predictors"),
        KeyRule("fastmlp.fc1.0", "fast_norm"),
        KeyRule("fastmlp.fc1.1", "fast_linear"),
        *SwinTransformer.published_keys,
    )
    published_constants = SwinTransformer.published_constants
    layouts = SwinTransformer.layouts  # those of the unpruned network, which training starts from

    def __init__(
        self,
        keep_ratio: float = 0.7,
        prune_before: Sequence[WholeNumber] = (1, 2, 3),
        embed_dim: Count = 96,
        depths: PerStage[Depth] = (2, 2, 6, 2),
        num_heads: PerStage[Count] = (3, 6, 12, 24),
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        dense: bool = False,
        **kwargs: Any,
    ) -> None:
        widths = [embed_dim * 2**i for i in range(len(depths))]
        rates = drop_path_rates(drop_path_rate, depths)

        def block(i: int, j: int) -> Block:
            attn = ShiftedWindowAttention(widths[i], num_heads[i], 7, j % 2 == 1, dense)
            if i == 2 and prune_before and j >= prune_before[0]:
                return SparseSwinBlock(widths[i], attn, rates[i][j])
            return Block(widths[i], attn, Mlp(widths[i], 4 * widths[i]), rates[i][j], eps=1e-5)

        stages = [
            Stage(
                PatchMerging(widths[i - 1], dim) if i else ConvEmbed(in_chans, dim, 4, 4, pad=True),
                [block(i, j) for j in range(depths[i])],
            )
            for i, dim in enumerate(widths)
        ]
        if prune_before:
            ratios = spatial_ratios(keep_ratio, len(prune_before))
            stages[2] = SparseStage(stages[2], widths[2], prune_before, ratios, eps=1e-5)
        norm, *out_norms = (nn.LayerNorm(dim, eps=1e-5) for dim in (widths[-1], *widths))
        super().__init__(stages, widths, norm, out_norms, in_chans=in_chans, dense=dense, **kwargs)
        self.minimum_size = 1
        self.apply(init_linear)

    @classmethod
    def from_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return tables_from_published(super().from_published(state))

    @classmethod
    def to_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().to_published(tables_to_published(state))


# Variants -------------------------------------------------------------------------------------------------------------

CONVNEXT_VARIANTS = {
    "dynamicvit_convnext_tiny": variant(
        "convnext-t_0.7",
        {},
        81.59,
        0.2,
        notes="keep_ratio 0.9 (weights convnext-t_0.9): 82.06. Unpruned host: 82.1.",
    ),
    "dynamicvit_convnext_small": variant(
        "convnext-s_0.7",
        {"depths": (3, 3, 27, 3), "prune_before": (3, 6, 9)},
        82.57,
        0.2,
        notes="keep_ratio 0.9 (weights convnext-s_0.9): 83.12. Unpruned host: 83.1.",
    ),
    "dynamicvit_convnext_base": variant(
        "convnext-b_0.7",
        {"depths": (3, 3, 27, 3), "embed_dims": (128, 256, 512, 1024), "prune_before": (3, 6, 9)},
        83.45,
        0.5,
        notes="keep_ratio 0.9 (weights convnext-b_0.9): 83.96. Unpruned host: 83.8.",
    ),
}

SWIN_VARIANTS = {
    "dynamicvit_swin_tiny": variant("swin-t_0.7", {}, 80.91, 0.2, notes="Unpruned host: 81.3."),
    "dynamicvit_swin_small": variant(
        "swin-s_0.7",
        {"depths": (2, 2, 18, 2), "prune_before": (2, 4, 6)},
        83.21,
        0.2,
        notes="Unpruned host: 83.0.",
    ),
    "dynamicvit_swin_base": variant(
        "swin-b_0.7",
        {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "prune_before": (2, 4, 6)},
        83.43,
        0.5,
        notes="Unpruned host: 83.5.",
    ),
}

_SOURCE = {
    "paper": "Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional Neural Networks, "
    "TPAMI 2023, arXiv 2207.01580",
    "repository": "raoyongming/DynamicViT",
    "licence": "MIT",
}

CONVNEXT = Family(
    model=DynamicConvNeXt,
    variants=CONVNEXT_VARIANTS,
    size_policy="Any size from 32 up, as published: every convolution rounds down. Keep ratios apply to the actual "
    "number of positions.",
    first_conv="stages.0.downsample.proj",
    **_SOURCE,
)
SWIN = Family(
    model=DynamicSwin,
    variants=SWIN_VARIANTS,
    size_policy="Any size: windows, padding and patch merging are as in Swin. Keep ratios apply to the positions "
    "without padding.",
    first_conv="stages.0.downsample.proj",
    **_SOURCE,
)
