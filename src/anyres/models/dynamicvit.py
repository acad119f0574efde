"""DynamicViT: small predictors score the tokens at three depths, and what scores low costs little from there on.

Plain hosts (DeiT, LV-ViT) drop such tokens; hierarchical hosts (ConvNeXt, Swin), whose map has to stay complete, send
them through one linear layer (fast path) while the others take the feed-forward network (slow path). At test time a
fixed share of the scores counts (`keep_ratio`), in training a sample of them; both are in `layers/sparsify.py`.

Papers: "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", Rao, Zhao, Liu, Lu, Zhou, Hsieh,
NeurIPS 2021, arXiv 2106.02034; "Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional
Neural Networks", Rao, Liu, Zhao, Zhou, Lu, TPAMI 2023, arXiv 2207.01580. Published code and weights:
raoyongming/DynamicViT (MIT).

Any input size: the shares are of the patches of the image at hand (published for 14x14 only in the DeiT host), at
least one patch stays. Otherwise each host has its own rule: plain hosts pad to whole patches and resize the position
table bicubically, ConvNeXt floors at every stage, as published, Swin is as in swin.py.

Quirks that checkpoints depend on: counts round down in floating point (0.7 - 0.2 keeps 97 of 196, not 98); a plain
host's shares are of all patches, not of those left, and a patch once dropped never comes back, while a hierarchical
host decides anew over all positions; LV-ViT halves both residual branches and adds half the per-class maximum of its
auxiliary head over the survivors to the logits, but only in evaluation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.backbone import Family, KeyRule, Variant, take_indices
from anyres.layers.attention import Block
from anyres.layers.init import init_linear
from anyres.layers.maps import ConvNorm, conv_grid, depthwise, on_map, to_map, to_nchw
from anyres.layers.patch_embed import ConvEmbed
from anyres.layers.sparsify import (
    PolicyAttention,
    ScorePredictor,
    decide,
    flat_rows,
    gather_tokens,
    keep_count,
    keep_mask,
    masked_mean,
    merge,
    split_by_score,
    two_paths,
)
from anyres.layers.windows import tables_from_published, tables_to_published
from anyres.models.swin import PatchMerging, ShiftedWindowAttention, SwinTransformer
from anyres.plain import Plain
from anyres.pyramid import Grid, Pyramid, Run, Stage, drop_path_rates


def predictor_keys(published: str, ours: str, unit_axes: Literal["", "conv"] = "") -> tuple[KeyRule, ...]:
    """The key rules of a list of score predictors, whose published layers are numbered."""
    layers = {"in_conv.0": "norm", "in_conv.1": "embed", "out_conv.0": "fc1", "out_conv.2": "fc2", "out_conv.4": "fc3"}
    return tuple(
        KeyRule(f"^{published}.{{i}}.{old}", f"^{ours}.{{i}}.{new}", unit_axes if new != "norm" else "")
        for old, new in layers.items()
    )


# Plain hosts: tokens are dropped --------------------------------------------------------------------------------------


class DynamicViT(Plain):
    """DeiT with token sparsification (section 3 of the first paper).

    Args:
        keep_ratio: share of the patches that stay after the first predictor; after the second and third its square and
            cube.
        prune_before: the blocks with a predictor in front; none makes the host itself, which is the teacher in
            training.
        position: "ape", "sine", "gpe" or "none": positions that are added to the tokens, and so stay with them.
    """

    block: type[Block] = Block
    eps = 1e-6
    published_keys: tuple[KeyRule, ...] = (
        KeyRule("pos_embed", "position.table"),
        *predictor_keys("score_predictor", "predictors"),
    )

    def __init__(
        self,
        patch_embed: nn.Module | None = None,
        /,
        keep_ratio: float = 0.7,
        prune_before: Sequence[int] = (3, 6, 9),
        position: str = "ape",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        check_ratio(keep_ratio, 0.0)
        if position not in ("ape", "sine", "gpe", "none") or kwargs.get("windows", "global") != "global":
            raise ValueError(
                "Where tokens are dropped no grid is left for positions or windows in the attention: choose position "
                "'ape', 'sine', 'gpe' or 'none' and windows 'global'."
            )
        blocks = (
            self.block(
                embed_dim,
                PolicyAttention(embed_dim, num_heads, qkv_bias, attn_drop_rate, proj_drop_rate),
                Mlp(embed_dim, int(embed_dim * mlp_ratio), drop=proj_drop_rate),
                drop_path_rate * i / max(depth - 1, 1),
                self.eps,
            )
            for i in range(depth)
        )
        super().__init__(patch_embed, blocks, position=position, embed_dim=embed_dim, num_heads=num_heads, **kwargs)
        self.norm = nn.LayerNorm(embed_dim, eps=self.eps)
        self.prune_before = tuple(prune_before)
        self.keep_ratios = tuple(keep_ratio ** (i + 1) for i in range(len(self.prune_before)))
        self.predictors = nn.ModuleList(ScorePredictor(embed_dim) for _ in self.prune_before)
        self.predictors.apply(init_linear)

    def forward_blocks(
        self, x: Tensor, queries: int | None = None, decisions: list[Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Grid]]:
        """Image → after each block the tokens (B, 1 + n, C), the positions (B, n) of its patches, and the whole grid.

        Keep masks (B, N), one per predictor, are appended to `decisions`. In training all patches stay and the masks
        are sampled; a patch once decided against stays so.
        """
        tokens, grid, _ = self.embed(x)
        B, N = tokens.shape[0], tokens.shape[1] - 1
        positions = torch.arange(N, device=x.device).expand(B, N)
        keep: Tensor | None = None
        for i, block in enumerate(self.blocks):
            if i in self.prune_before:
                j = self.prune_before.index(i)
                log_probs = self.predictors[j](tokens[:, 1:], keep)
                if self.training:
                    keep = decide(log_probs) if keep is None else decide(log_probs) * keep
                else:
                    chosen, _ = split_by_score(log_probs[..., 0], keep_count(N, self.keep_ratios[j]))
                    tokens = gather_tokens(tokens, F.pad(chosen + 1, (1, 0)))  # row 0 is the class token
                    positions = positions.gather(1, chosen)
                if decisions is not None:
                    decisions.append(keep_mask(positions, N) if keep is None else keep)
            last = i == len(self.blocks) - 1
            tokens = self.run(block, tokens, queries if last else None, keep)
            yield tokens, positions, grid

    def encode(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Image → the class token and the patches that are left (in training: all), after the final norm."""
        *_, (tokens, _, _) = self.forward_blocks(x, queries)
        return self.norm(tokens)

    def forward(self, x: Tensor) -> Any:
        """(B, in_chans, H, W) → (B, num_classes), in training with sampled decisions; the dense form's list of maps."""
        if self.training and not self.dense:
            return self.forward_train(x)["logits"]
        return super().forward(x)

    def forward_train(self, x: Tensor, targets: Sequence[str] = ("cls",)) -> dict[str, Tensor]:
        """Adds "tokens", the normed patches (B, n, C), and, of a model with predictors, "decisions", their keep masks
        (B, predictors, N)."""
        decisions: list[Tensor] = []
        *_, (tokens, _, _) = self.forward_blocks(x, None, decisions)
        tokens = self.norm(tokens)
        patches = tokens[:, 1:]
        gap = masked_mean(patches, decisions[-1] if self.training and decisions else None)
        pooled = gap if self.global_pool == "avg" else self.pool(tokens)
        logits = self.head(self.head_drop(pooled))
        out = {"logits": logits, "logit": logits, "cls": pooled, "tokens": patches}
        if "gap" in targets:
            out["gap"] = gap
        if decisions:
            out["decisions"] = torch.stack(decisions, dim=1)
        return out

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As every plain model; a position whose patch is gone keeps the patch's last value."""
        wanted, deepest = take_indices(len(self.blocks), indices, output_fmt)
        features: list[Any] = []
        whole_BNC: Tensor | None = None
        for i, (tokens, positions, grid) in enumerate(self.forward_blocks(x)):
            patches = tokens[:, 1:]
            complete = patches.shape[1] == grid[0] * grid[1]
            if whole_BNC is None or complete:
                whole_BNC = patches
            else:
                whole_BNC = whole_BNC.scatter(1, positions[..., None].expand_as(patches), patches)
            if i in wanted:
                map_ = self.norm(whole_BNC) if norm else whole_BNC
                out = map_.unflatten(1, grid).permute(0, 3, 1, 2) if output_fmt == "NCHW" else map_
                prefix = self.norm(tokens[:, :1]) if norm else tokens[:, :1]
                features.append((out, prefix) if return_prefix_tokens else out)
            if i == deepest and (stop_early or intermediates_only):
                break
        return features if intermediates_only else (self.norm(tokens), features)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        wanted = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.predictors = self.predictors[: sum(i < len(self.blocks) for i in self.prune_before)]
        return wanted


def check_ratio(keep_ratio: float, above: float) -> None:
    if not above < keep_ratio <= 1:
        raise ValueError(f"keep_ratio={keep_ratio} must be above {above:g} and at most 1: choose 0.7.")


class HalvedBlock(Block):
    """LV-ViT's block: both branches are divided by 2 before they are added."""

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        y = self.drop_path1(self.attn(self.norm1(x), *context))
        x = torch.add(x[:, : y.shape[1]], y, alpha=0.5)
        return torch.add(x, self.drop_path2(self.mlp(self.norm2(x))), alpha=0.5)


class ConvStem(nn.Module):
    """LV-ViT's patch embedding: three convolutions at stride 2, then patches of 8x8 of their map. Zeros at the right
    and the bottom fill the last patches."""

    patch_size = 16

    def __init__(self, in_chans: int, dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.stem = nn.ModuleList(
            [ConvNorm(in_chans, hidden, 7, 2), ConvNorm(hidden, hidden, 3), ConvNorm(hidden, hidden, 3)]
        )
        self.proj = nn.Conv2d(hidden, dim, 8, 8)

    def grid(self, height: int, width: int) -> Grid:
        return -(-height // 16), -(-width // 16)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, in_chans, H, W) → (B, dim, h, w)."""
        x = to_map(F.pad(x_BCHW, (0, -x_BCHW.shape[-1] % 16, 0, -x_BCHW.shape[-2] % 16)))
        for layer in self.stem:
            x = F.relu(layer(x))
        return self.proj(to_nchw(x))


class DynamicLVViT(DynamicViT):
    """LV-ViT with token sparsification: a convolutional stem, halved branches, and an auxiliary head on every patch."""

    block = HalvedBlock
    eps = 1e-5
    published_keys = (
        *DynamicViT.published_keys,
        KeyRule("^patch_embed.conv{i+1}", "^patch_embed.stem.{i}.conv"),
        KeyRule("^patch_embed.bn{i+1}", "^patch_embed.stem.{i}.norm"),
    )

    def __init__(
        self,
        embed_dim: int = 384,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        in_chans: int = 3,
        **kwargs: Any,
    ) -> None:
        stem = ConvStem(in_chans, embed_dim)
        super().__init__(stem, embed_dim=embed_dim, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, in_chans=in_chans, **kwargs)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self.new_head(num_classes)

    def get_classifier(self) -> nn.Module:
        return nn.ModuleList([self.head, self.aux_head])

    def forward(self, x: Tensor) -> Any:
        """The auxiliary head reads the last block's patches too."""
        if self.training or self.dense:
            return super().forward(x)
        return self.forward_head(self.encode(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class logits + 0.5 · the maximum of the auxiliary logits over the patches."""
        logits = super().forward_head(x, pre_logits)
        if pre_logits or self.num_classes == 0 or self.global_pool != "token":
            return logits
        return logits + 0.5 * self.aux_head(x[:, 1:]).amax(dim=1)

    def forward_train(self, x: Tensor, targets: Sequence[str] = ("cls",)) -> dict[str, Tensor]:
        """ "logits" are those of the class token alone; adds "aux_logits" (B, n, num_classes) of the patches."""
        out = super().forward_train(x, targets)
        out["aux_logits"] = self.aux_head(out["tokens"])
        # The auxiliary head stays in the graph of the logits: distributed training waits for its (zero) gradient.
        out["logits"] = out["logit"] = out["logits"] + 0 * out["aux_logits"].sum()
        return out


# Hierarchical hosts: tokens take a slow or a fast path ----------------------------------------------------------------


class SparseStage(Stage):
    """A stage whose blocks, from the first in `prune_before` on, have two paths; the predictor before a block decides
    over all positions until the next one does.

    Such a block is a `TwoPathBlock`. The companion that the stage returns is the keep masks (B, predictors, N).
    """

    def __init__(
        self, stage: Stage, dim: int, prune_before: Sequence[int], keep_ratios: Sequence[float], eps: float
    ) -> None:
        super().__init__(stage.downsample, stage.blocks)
        self.prune_before = tuple(prune_before)
        self.keep_ratios = tuple(keep_ratios)
        self.predictors = nn.ModuleList(ScorePredictor(dim, eps) for _ in self.prune_before)

    def forward(self, x: Tensor, extra: Tensor | None, run: Run) -> tuple[Tensor, Tensor | None]:
        x = self.downsample(x)
        for block in self.blocks[: self.prune_before[0]]:
            x = run(block, x)
        x, decisions = self.sample(x, run) if self.training else self.select(x, run)
        return self.norm(x), decisions

    def spans(self) -> Iterator[tuple[nn.Module, float, Any]]:
        """(predictor, share, the blocks that it decides for), one after the other."""
        ends = (*self.prune_before[1:], len(self.blocks))
        for predictor, ratio, start, end in zip(
            self.predictors, self.keep_ratios, self.prune_before, ends, strict=True
        ):
            yield predictor, ratio, self.blocks[start:end]

    def select(self, x: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Evaluation: one map, top-k."""
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
        """Training: two maps, sampled decisions. A position that changes sides goes on with the other map's history."""
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
    """A block of a `SparseStage`."""

    def forward(self, slow: Tensor, fast: Tensor | None, choice: Any) -> Any:
        """In evaluation one map (B, h, w, C), no second, and as `choice` its (slow rows, fast rows) → the map.

        In training two maps, one where all positions took the slow path, one where all took the fast one, and the keep
        mask (B, h, w, 1) → both maps.
        """
        return self.split(slow, *choice) if fast is None else self.both(slow, fast, choice)

    @abstractmethod
    def split(self, x: Tensor, slow_rows: Tensor, fast_rows: Tensor) -> Tensor: ...

    @abstractmethod
    def both(self, slow: Tensor, fast: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]: ...


class DynamicPyramid(Pyramid):
    """What hierarchical hosts share: the third of the four stages is a `SparseStage`."""

    @property
    def keep_ratios(self) -> tuple[float, ...]:
        """Share of the slow path after each predictor."""
        stage = self.stages[2]
        return stage.keep_ratios if isinstance(stage, SparseStage) else ()

    def forward_train(self, x: Tensor, targets: Sequence[str] = ("cls",)) -> dict[str, Tensor]:
        """Adds "map", the normed last map (B, h, w, C), and, of a model with predictors, "decisions", their keep masks
        (B, predictors, N)."""
        *_, (last, decisions) = self.forward_stages(x)
        features = self.finish(last, decisions)
        pooled = self.pool(features)
        logits = self.head(self.head_drop(pooled))
        out = {"logits": logits, "logit": logits, "cls": pooled, "map": self.norm(last)}
        if "gap" in targets:
            out["gap"] = self.mean_patch(out["map"])
        if decisions is not None:
            out["decisions"] = decisions
        return out


def spatial_ratios(keep_ratio: float, predictors: int) -> tuple[float, ...]:
    """The share of the slow path after each predictor: 0.2 less every time (second paper)."""
    check_ratio(keep_ratio, 0.2 * (predictors - 1))
    return tuple(keep_ratio - 0.2 * i for i in range(predictors))


# ConvNeXt


class NormConv(nn.Module):
    """ConvNeXt's way into a stage: LayerNorm, then a 2x2 convolution of stride 2."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(in_dim, eps=1e-6)
        self.reduction = nn.Conv2d(in_dim, dim, 2, 2)

    def grid(self, height: int, width: int) -> Grid:
        return conv_grid(self.reduction, height, width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return on_map(self.reduction, self.input_norm(x_BHWC))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, LayerNorm, feed-forward network, layer scale, residual."""

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


class SparseConvNeXtBlock(TwoPathBlock, ConvNeXtBlock):  # type: ignore[misc]  # its forward takes other things
    """ConvNeXt's block with a fast path beside the feed-forward network."""

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
        """Each branch sees the merged map at its own positions and its own map elsewhere."""
        y = on_map(self.dwconv, merge(keep, slow, fast))
        return (
            slow + self.drop_path(self.slow(merge(keep, y, slow))),
            fast + self.drop_path(self.fast(merge(keep, fast, y))),
        )


def init_convnext(module: nn.Module) -> None:
    """Truncated normal 0.02 for convolutions and linear layers, zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class DynamicConvNeXt(DynamicPyramid):
    """ConvNeXt with spatial sparsification ("DynamicCNN").

    Args:
        keep_ratio: share of the third stage's positions on the slow path after the first predictor; 0.2 and 0.4 less
            after the second and third.
        prune_before: the blocks of the third stage with a predictor in front; none makes ConvNeXt itself, which is the
            teacher in training.
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
        prune_before: Sequence[int] = (1, 2, 3),
        depths: Sequence[int] = (3, 3, 9, 3),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
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
        """The last map as it is: ConvNeXt's norm comes after the mean."""
        return x_BHWC

    def pool(self, features: Tensor) -> Tensor:
        return self.norm(super().pool(features))


# Swin


class SparseSwinBlock(TwoPathBlock, Block):
    """Swin's block with a fast path beside the feed-forward network; attention is always over the whole map."""

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
        """Both maps go on from the merged one, unlike ConvNeXt's."""
        x = merge(keep, slow, fast)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return (
            x + self.drop_path2(self.slow(merge(keep, x, slow))),
            x + self.drop_path2(self.fast(merge(keep, fast, x))),
        )


class DynamicSwin(DynamicPyramid):
    """Swin with spatial sparsification ("DynamicSwin"), windows of 7x7. Arguments as of `DynamicConvNeXt`."""

    no_decay = ("bias_table",)
    published_keys = (
        *predictor_keys("layers.2.score_predictor", "stages.2.predictors"),
        KeyRule("fastmlp.fc1.0", "fast_norm"),
        KeyRule("fastmlp.fc1.1", "fast_linear"),
        *SwinTransformer.published_keys,
    )
    published_constants = SwinTransformer.published_constants

    def __init__(
        self,
        keep_ratio: float = 0.7,
        prune_before: Sequence[int] = (1, 2, 3),
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
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


def _variant(published: str, args: dict[str, Any], top1: float, drop_path: float = 0.0, notes: str = "") -> Variant:
    return Variant(published=published, args=args, drop_path=drop_path, top1={224: top1}, notes=notes)


DEIT_VARIANTS = {
    "dynamicvit_deit_256": _variant("deit-256_0.7", {"embed_dim": 256, "num_heads": 4}, 76.53),
    "dynamicvit_deit_small": _variant(
        "deit-s_0.7",
        {"embed_dim": 384, "num_heads": 6},
        79.32,
        notes="keep_ratio 0.9: 79.8, 0.8: 79.6 (NeurIPS paper). Unpruned host: 79.9.",
    ),
    "dynamicvit_deit_base": _variant(
        "deit-b_0.7", {"embed_dim": 768, "num_heads": 12}, 81.43, 0.2, notes="Unpruned host: 81.8."
    ),
}
LVVIT_VARIANTS = {
    "dynamicvit_lvvit_small": _variant(
        "lvvit-s_0.7",
        {"embed_dim": 384, "depth": 16, "num_heads": 6, "prune_before": (4, 8, 12)},
        83.08,
        notes="keep_ratio 0.5 (weights lvvit-s_0.5): 81.97. Unpruned host: 83.3.",
    ),
    "dynamicvit_lvvit_medium": _variant(
        "lvvit-m_0.7",
        {"embed_dim": 512, "depth": 20, "num_heads": 8, "prune_before": (5, 10, 15)},
        83.82,
        notes="Unpruned host: 84.0.",
    ),
}
CONVNEXT_VARIANTS = {
    "dynamicvit_convnext_tiny": _variant(
        "convnext-t_0.7",
        {},
        81.59,
        0.2,
        notes="keep_ratio 0.9 (weights convnext-t_0.9): 82.06. Unpruned host: 82.1.",
    ),
    "dynamicvit_convnext_small": _variant(
        "convnext-s_0.7",
        {"depths": (3, 3, 27, 3), "prune_before": (3, 6, 9)},
        82.57,
        0.2,
        notes="keep_ratio 0.9 (weights convnext-s_0.9): 83.12. Unpruned host: 83.1.",
    ),
    "dynamicvit_convnext_base": _variant(
        "convnext-b_0.7",
        {"depths": (3, 3, 27, 3), "embed_dims": (128, 256, 512, 1024), "prune_before": (3, 6, 9)},
        83.45,
        0.5,
        notes="keep_ratio 0.9 (weights convnext-b_0.9): 83.96. Unpruned host: 83.8.",
    ),
}

SWIN_VARIANTS = {
    "dynamicvit_swin_tiny": _variant("swin-t_0.7", {}, 80.91, 0.2, notes="Unpruned host: 81.3."),
    "dynamicvit_swin_small": _variant(
        "swin-s_0.7",
        {"depths": (2, 2, 18, 2), "prune_before": (2, 4, 6)},
        83.21,
        0.2,
        notes="Unpruned host: 83.0.",
    ),
    "dynamicvit_swin_base": _variant(
        "swin-b_0.7",
        {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "prune_before": (2, 4, 6)},
        83.43,
        0.5,
        notes="Unpruned host: 83.5.",
    ),
}

_PAPER = (
    "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification, NeurIPS 2021, arXiv 2106.02034; "
    "Dynamic Spatial Sparsification for Efficient Vision Transformers and Convolutional Neural Networks, TPAMI 2023, "
    "arXiv 2207.01580"
)
_SOURCE = {"paper": _PAPER, "repository": "raoyongming/DynamicViT", "licence": "MIT"}
_PLAIN_SIZES = (
    "Any size from one patch up; the position table is resized bicubically, a side that the patch does not divide is "
    "padded, and the shares are of the patches there are."
)

DEIT = Family(model=DynamicViT, variants=DEIT_VARIANTS, size_policy=_PLAIN_SIZES, **_SOURCE)
LVVIT = Family(
    model=DynamicLVViT,
    variants=LVVIT_VARIANTS,
    size_policy=_PLAIN_SIZES,
    classifier=("head", "aux_head"),
    first_conv="patch_embed.stem.0.conv",
    **_SOURCE,
)
CONVNEXT = Family(
    model=DynamicConvNeXt,
    variants=CONVNEXT_VARIANTS,
    size_policy="Any size from 32 up, as published: every convolution floors, and the shares are of the positions "
    "there are.",
    first_conv="stages.0.downsample.proj",
    **_SOURCE,
)
SWIN = Family(
    model=DynamicSwin,
    variants=SWIN_VARIANTS,
    size_policy="Any size: windows, padding and merging as in Swin; the shares are of the positions without padding.",
    first_conv="stages.0.downsample.proj",
    **_SOURCE,
)
