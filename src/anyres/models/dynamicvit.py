"""DynamicViT: small predictors score the tokens at three depths, and plain hosts drop those with low scores.

At test time a fixed share of the patches is kept, those with the best scores (`keep_ratio`); in training the choice is
sampled. Both are in `layers/sparsify.py`. The hosts are DeiT and LV-ViT; hierarchical ones are in `dynamic_spatial.py`.

Paper: "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", Rao, Zhao, Liu, Lu, Zhou, Hsieh,
NeurIPS 2021, arXiv 2106.02034. Published code and weights: raoyongming/DynamicViT (MIT).

Any input size: the shares refer to the patches of the current image (the published DeiT host supports 14x14 only), and
at least one patch is kept. As in other plain models, images are padded to whole patches and the position table is
resized bicubically.

Quirks that checkpoints depend on: counts are rounded down in floating point (0.7 - 0.2 keeps 97 of 196, not 98); a
host's shares refer to all patches, not to those that remain, and a dropped patch never comes back; LV-ViT halves both
residual branches and, in evaluation only, adds half the per-class maximum of its auxiliary head over the remaining
patches to the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.errors import UserError
from anyres.layers.attention import Block
from anyres.layers.init import init_linear
from anyres.layers.maps import ConvNorm, pad_to_multiple, to_map, to_nchw
from anyres.layers.sizes import known
from anyres.layers.sparsify import (
    PolicyAttention,
    ScorePredictor,
    check_places,
    decide,
    gather_tokens,
    keep_count,
    keep_mask,
    masked_mean,
    split_by_score,
)
from anyres.models._backbone import Family, Variant, take_indices
from anyres.models._keys import KeyRule
from anyres.models._plain import Plain
from anyres.models.deit import DeiT
from anyres.options import Count, Depth, Factor, Rate, WholeNumber
from anyres.shapes import Grid


def predictor_keys(published: str, ours: str, unit_axes: Literal["", "conv"] = "") -> tuple[KeyRule, ...]:
    """Return the key rules for a list of score predictors, whose published layers are numbered."""
    layers = {"in_conv.0": "norm", "in_conv.1": "embed", "out_conv.0": "fc1", "out_conv.2": "fc2", "out_conv.4": "fc3"}
    return tuple(
        KeyRule(f"^{published}.{{i}}.{old}", f"^{ours}.{{i}}.{new}", unit_axes if new != "norm" else "")
        for old, new in layers.items()
    )


class DynamicViT(Plain):
    """DeiT with token sparsification (section 3).

    Args:
        keep_ratio: share of the patches that are kept after the first predictor; its square and cube are kept after the
            second and third.
        prune_before: the blocks that have a predictor before them; an empty list gives the host itself, the teacher in
            training.
        position: "ape", "sine", "gpe" or "none": encodings that are added to the tokens, so they survive when tokens
            are dropped.
    """

    fixed_options: tuple[str, ...] = ("prefix_tokens", "position_args", "windows", "window_size")
    block: type[Block] = Block
    eps = 1e-6
    published_keys: tuple[KeyRule, ...] = (
        KeyRule("pos_embed", "position.table"),
        *predictor_keys("score_predictor", "predictors"),
    )

    layouts = DeiT.layouts  # those of the unpruned network, which training starts from

    def __init__(
        self,
        patch_embed: nn.Module | None = None,
        /,
        keep_ratio: float = 0.7,
        prune_before: Sequence[WholeNumber] = (3, 6, 9),
        position: Literal["ape", "sine", "gpe", "none"] = "ape",
        embed_dim: Count = 384,
        depth: Depth = 12,
        num_heads: Count = 6,
        mlp_ratio: Factor = 4.0,
        qkv_bias: bool = True,
        proj_drop_rate: Rate = 0.0,
        attn_drop_rate: Rate = 0.0,
        drop_path_rate: Rate = 0.0,
        **kwargs: Any,
    ) -> None:
        check_ratio(keep_ratio, 0.0)
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
        self.prune_before = check_places(prune_before, depth)
        self.keep_ratios = tuple(keep_ratio ** (i + 1) for i in range(len(self.prune_before)))
        self.predictors = nn.ModuleList(ScorePredictor(embed_dim) for _ in self.prune_before)
        self.predictors.apply(init_linear)

    def forward_blocks(
        self, x: Tensor, queries: int | None = None, decisions: list[Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Grid]]:
        """Yield the tokens (B, 1 + n, C), the positions (B, n) of the patches, and the whole grid after each block.

        Keep masks (B, N), one per predictor, are appended to `decisions`. In training all patches are kept and the
        masks are sampled; a patch that one mask drops stays dropped in the following ones.
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
        """Image → class token and remaining patches (in training, all patches), after the final norm."""
        *_, (tokens, _, _) = self.forward_blocks(x, queries)
        return self.norm(tokens)

    def forward(self, x: Tensor) -> Any:
        """(B, in_chans, H, W) → logits (B, num_classes), or a list of maps; decisions are sampled in training."""
        if self.training and not self.dense:
            return self.forward_train(x)["logits"]
        return super().forward(x)

    def forward_train(self, x: Tensor, targets: Sequence[str] = ("cls",)) -> dict[str, Tensor]:
        """Add "tokens", the normed patches (B, n, C), to the outputs.

        A model with predictors also adds "decisions", their keep masks (B, predictors, N).
        """
        decisions: list[Tensor] = []
        *_, (tokens, _, _) = self.forward_blocks(x, None, decisions)
        tokens = self.norm(tokens)
        patches = tokens[:, 1:]
        gap = masked_mean(patches, decisions[-1] if self.training and decisions else None)
        pooled = gap if self.global_pool == "avg" else self.pool(tokens)
        logits = self.head(self.head_drop(pooled))
        out = {"logits": logits, "cls": pooled, "tokens": patches}
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
        """Return maps as in every plain model; the position of a dropped patch keeps that patch's last value."""
        wanted, deepest = take_indices(len(self.blocks), indices, output_fmt)
        features: list[Any] = []
        whole_BNC: Tensor | None = None
        for i, (tokens, positions, grid) in enumerate(self.forward_blocks(x)):
            patches = tokens[:, 1:]
            complete = known(patches.shape[1] == grid[0] * grid[1])
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
        raise UserError(f"keep_ratio={keep_ratio} must be above {above:g} and at most 1: choose 0.7.")


class HalvedBlock(Block):
    """LV-ViT's block: both residual branches are divided by 2 before they are added."""

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        y = self.drop_path1(self.attn(self.norm1(x), *context))
        x = torch.add(x[:, : y.shape[1]], y, alpha=0.5)
        return torch.add(x, self.drop_path2(self.mlp(self.norm2(x))), alpha=0.5)


class ConvStem(nn.Module):
    """LV-ViT's patch embedding: three convolutions at stride 2, then patches of 8x8 positions of their map.

    The map is zero-padded at the right and the bottom to whole patches.
    """

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
        x = to_map(pad_to_multiple(x_BCHW, 16, axis=2))
        for layer in self.stem:
            x = F.relu(layer(x))
        return self.proj(to_nchw(x))


class DynamicLVViT(DynamicViT):
    """LV-ViT with token sparsification: a convolutional stem, halved branches, and an auxiliary head on every patch."""

    fixed_options = (*DynamicViT.fixed_options, "patch_size", "stride", "remainder")
    block = HalvedBlock
    eps = 1e-5
    published_keys = (
        *DynamicViT.published_keys,
        KeyRule("^patch_embed.conv{i+1}", "^patch_embed.stem.{i}.conv"),
        KeyRule("^patch_embed.bn{i+1}", "^patch_embed.stem.{i}.norm"),
    )

    def __init__(
        self,
        embed_dim: Count = 384,
        mlp_ratio: Factor = 3.0,
        qkv_bias: bool = False,
        in_chans: Count = 3,
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
        """Run the last block on all tokens, because the auxiliary head reads the patches too."""
        if self.training or self.dense:
            return super().forward(x)
        return self.forward_head(self.encode(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return class logits + 0.5 · maximum of the auxiliary logits over the patches."""
        logits = super().forward_head(x, pre_logits)
        if pre_logits or self.num_classes == 0 or self.global_pool != "token":
            return logits
        return logits + 0.5 * self.aux_head(x[:, 1:]).amax(dim=1)

    def forward_train(self, x: Tensor, targets: Sequence[str] = ("cls",)) -> dict[str, Tensor]:
        """Return the logits of the class token alone, and add "aux_logits" (B, n, num_classes) of the patches."""
        out = super().forward_train(x, targets)
        out["aux_logits"] = self.aux_head(out["tokens"])
        # Keep the auxiliary head in the graph of the logits: distributed training waits for its (zero) gradient.
        out["logits"] = out["logits"] + 0 * out["aux_logits"].sum()
        return out


# Variants -------------------------------------------------------------------------------------------------------------


def variant(published: str, args: dict[str, Any], top1: float, drop_path: float = 0.0, notes: str = "") -> Variant:
    return Variant(published=published, args=args, drop_path=drop_path, top1={224: top1}, notes=notes)


DEIT_VARIANTS = {
    "dynamicvit_deit_256": variant("deit-256_0.7", {"embed_dim": 256, "num_heads": 4}, 76.53),
    "dynamicvit_deit_small": variant(
        "deit-s_0.7",
        {"embed_dim": 384, "num_heads": 6},
        79.32,
        notes="keep_ratio 0.9: 79.8, 0.8: 79.6 (NeurIPS paper). Unpruned host: 79.9.",
    ),
    "dynamicvit_deit_base": variant(
        "deit-b_0.7", {"embed_dim": 768, "num_heads": 12}, 81.43, 0.2, notes="Unpruned host: 81.8."
    ),
}
LVVIT_VARIANTS = {
    "dynamicvit_lvvit_small": variant(
        "lvvit-s_0.7",
        {"embed_dim": 384, "depth": 16, "num_heads": 6, "prune_before": (4, 8, 12)},
        83.08,
        notes="keep_ratio 0.5 (weights lvvit-s_0.5): 81.97. Unpruned host: 83.3.",
    ),
    "dynamicvit_lvvit_medium": variant(
        "lvvit-m_0.7",
        {"embed_dim": 512, "depth": 20, "num_heads": 8, "prune_before": (5, 10, 15)},
        83.82,
        notes="Unpruned host: 84.0.",
    ),
}

_SOURCE = {
    "paper": "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification, NeurIPS 2021, "
    "arXiv 2106.02034",
    "repository": "raoyongming/DynamicViT",
    "licence": "MIT",
}
_PLAIN_SIZES = (
    "Any size from one patch up: the position table is resized bicubically, and sides are padded to whole patches. "
    "Keep ratios apply to the actual number of patches."
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
