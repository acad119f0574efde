"""Skeleton of the plain transformers: one grid of tokens, one width, prefix tokens first (ViT and its descendants)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from anyres.backbone import Backbone, pair, take_indices
from anyres.layers.attention import Attention, Block
from anyres.layers.init import init_linear
from anyres.layers.patch_embed import PatchEmbed, Remainder
from anyres.layers.positions import (
    AbsoluteTable,
    AxialRotary,
    ContinuousBias,
    GlobalPositionEmbedding,
    Grid,
    LocalPositionEmbedding,
    RelativeBiasTable,
    Rotation,
    SineMap,
)


@dataclass(frozen=True)
class Position:
    """Which position mechanisms a plain model combines: one per place where they can act."""

    tokens: Literal["table", "sine", "gpe"] | None = None
    logits: Literal["table", "continuous"] | None = None
    rotary: bool = False
    local: bool = False
    jitter: tuple[float, float] | None = None
    log_scale: bool = False


POSITIONS = {
    "none": Position(),
    "ape": Position(tokens="table"),
    "sine": Position(tokens="sine"),
    "gpe": Position(tokens="gpe"),
    "lpe": Position(local=True),
    "glpe": Position(tokens="gpe", local=True),
    "rpb": Position(logits="table"),
    "cpb": Position(logits="continuous"),
    "rope": Position(rotary=True),
    "rlpe": Position(rotary=True, local=True, jitter=(0.75, 1.25), log_scale=True),
}
"""Position information by name: the rows of ResFormer's ablation (Table 6), rotary positions, and rotary + LPE."""


class Plain(Backbone):
    """A plain transformer for any input size.

    Args:
        img_size: native size, a side or (height, width): the size of stored position tables, nothing else.
        patch_size: side of a patch in pixels; `remainder` ("pad" or "truncate") says what happens to sides it does not
            divide.
        position: a name in `POSITIONS`.
        prefix_tokens: names of the learned tokens put before the patches, in order.
        dense: the form that detectors and segmenters take: no head; `model(x)` returns the list of maps (B, C, h, w) of
            the levels in `default_out_indices`, the last one normed.
        global_pool: "token" (first prefix token), "avg" (mean patch token), or "" (no pooling).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        position: str = "ape",
        prefix_tokens: Sequence[str] = ("cls_token",),
        remainder: Remainder = "pad",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dense: bool = False,
    ) -> None:
        super().__init__()
        if position not in POSITIONS:
            raise ValueError(f"position={position!r} is not known: choose one of {', '.join(POSITIONS)}.")
        if remainder not in ("pad", "truncate"):
            raise ValueError(f"remainder={remainder!r} is not known: choose 'pad' or 'truncate'.")
        if global_pool == "token" and not prefix_tokens:
            raise ValueError("global_pool='token' needs a prefix token: choose 'avg'.")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.minimum_size = patch_size
        self.num_prefix_tokens = len(prefix_tokens)
        self.has_cls_token = "cls_token" in prefix_tokens
        self.prefix_names = tuple(prefix_tokens)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, remainder)
        for name in self.prefix_names:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, embed_dim)))
        choice = POSITIONS[position]
        native_grid = self.patch_embed.grid(*pair(img_size))
        head_dim = embed_dim // num_heads
        self.position = self._token_position(choice, native_grid)
        native_tokens = self.num_prefix_tokens + native_grid[0] * native_grid[1]
        self.rotary = (
            AxialRotary(
                head_dim,
                self.num_prefix_tokens,
                jitter=choice.jitter,
                log_scale_tokens=native_tokens if choice.log_scale else None,
            )
            if choice.rotary
            else None
        )
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                Attention(
                    embed_dim,
                    num_heads,
                    qkv_bias,
                    attn_drop_rate,
                    proj_drop_rate,
                    bias=self._logit_position(choice, num_heads, native_grid),
                    local=LocalPositionEmbedding(head_dim) if choice.local else None,
                ),
                Mlp(embed_dim, int(embed_dim * mlp_ratio), drop=proj_drop_rate),
                rate,
            )
            for rate in rates
        )
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.apply(init_linear)
        for name in self.prefix_names:
            nn.init.trunc_normal_(getattr(self, name), std=0.02)
        self.dense = dense
        self.dense_levels = self.default_out_indices({"depth": depth})
        self.reset_classifier(0 if dense else num_classes, global_pool)

    def _token_position(self, choice: Position, native_grid: Grid) -> AbsoluteTable | SineMap | None:
        if choice.tokens == "table":
            return AbsoluteTable(self.embed_dim, native_grid, self.num_prefix_tokens)
        if choice.tokens is None:
            return None
        kind = SineMap if choice.tokens == "sine" else GlobalPositionEmbedding
        return kind(self.embed_dim, self.num_prefix_tokens)

    @staticmethod
    def _logit_position(choice: Position, heads: int, native_grid: Grid) -> RelativeBiasTable | ContinuousBias | None:
        if choice.logits is None:
            return None
        return (RelativeBiasTable if choice.logits == "table" else ContinuousBias)(heads, native_grid)

    # Forward --------------------------------------------------------------------------------------------------------

    def embed(self, x: Tensor) -> tuple[Tensor, Grid, Rotation | None]:
        """Image → (tokens (B, prefix + h·w, C) with token positions added, grid (h, w), rotation for the attention)."""
        self.check_size(x)
        patches = self.patch_embed(x)
        grid = (patches.shape[-2], patches.shape[-1])
        prefix = [getattr(self, name).expand(x.shape[0], -1, -1) for name in self.prefix_names]
        tokens = torch.cat([*prefix, patches.flatten(2).transpose(1, 2)], dim=1)
        if isinstance(self.position, AbsoluteTable):
            tokens = tokens + self.position(grid)
        elif self.position is not None:
            tokens = tokens + self.position(grid, tokens)
        return tokens, grid, None if self.rotary is None else self.rotary(grid, tokens)

    def encode(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Image → tokens after the final norm (B, N, C); with `queries` only that many first rows, which the last
        block computes alone."""
        tokens, grid, rotation = self.embed(x)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            tokens = self.run(block, tokens, grid, rotation, queries if i == last else None)
        return self.norm(tokens)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.encode(x)

    def forward(self, x: Tensor) -> Any:
        """(B, in_chans, H, W) → (B, num_classes), in the dense form the list of maps (B, C, h, w). A head that reads
        only prefix tokens does not pay for the last block's patches."""
        if self.dense:
            *maps, last = self.forward_intermediates(x, self.dense_levels, intermediates_only=True)
            return [*maps, self.norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]
        return self.forward_head(self.encode(x, self.num_prefix_tokens if self.global_pool == "token" else None))

    def pool(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) → (B, C) as `global_pool` says."""
        if self.global_pool == "avg":
            return x_BNC[:, self.num_prefix_tokens :].mean(1)
        return x_BNC[:, 0] if self.global_pool == "token" else x_BNC

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward_train(self, x: Tensor, targets: Sequence[str] = ("cls",)) -> dict[str, Tensor]:
        only_prefix = self.global_pool == "token" and "gap" not in targets
        tokens = self.encode(x, self.num_prefix_tokens if only_prefix else None)
        out = {"logits": self.forward_head(tokens), "cls": self.pool(tokens)}
        out["logit"] = out["logits"]
        if "gap" in targets:
            out["gap"] = tokens[:, self.num_prefix_tokens :].mean(1)
        return out

    def feature_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        return [self.patch_embed.grid(height, width)] * len(self.feature_info)

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
        wanted, deepest = take_indices(len(self.blocks), indices, output_fmt)
        tokens, grid, rotation = self.embed(x)
        collected = []
        for i, block in enumerate(self.blocks[: deepest + 1] if stop_early or intermediates_only else self.blocks):
            tokens = self.run(block, tokens, grid, rotation)
            if i in wanted:
                collected.append(self.norm(tokens) if norm else tokens)
        patches = [t[:, self.num_prefix_tokens :] for t in collected]
        if output_fmt == "NCHW":  # a channels-last view: no copy
            patches = [p.unflatten(1, grid).permute(0, 3, 1, 2) for p in patches]
        features: list[Any] = patches
        if return_prefix_tokens:
            features = list(zip(patches, [t[:, : self.num_prefix_tokens] for t in collected], strict=True))
        return features if intermediates_only else (self.norm(tokens), features)

    # Head and training hooks ----------------------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            if global_pool not in ("token", "avg", ""):
                raise ValueError(f"global_pool={global_pool!r} is not known: choose 'token', 'avg' or ''.")
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = self._new_head(num_classes)

    def _new_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes)
        init_linear(head)
        return head.to(next(self.parameters()).device)

    def no_weight_decay(self) -> set[str]:
        positional = ("position.", ".attn.local.", ".attn.bias.")
        return {
            name
            for name, _ in self.named_parameters()
            if name in self.prefix_names or name.startswith("position.") or any(part in name for part in positional)
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": rf"^(?:{'|'.join((*self.prefix_names, 'position', 'patch_embed'))})",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def fit_tables(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        resized = {}
        for prefix, module in self.named_modules():
            name = f"{prefix}.table"
            if isinstance(module, AbsoluteTable | RelativeBiasTable) and name in state:
                table = module.fit(state[name])
                if table is not state[name]:
                    resized[name] = table
        return resized

    @classmethod
    def default_out_indices(cls, args: dict[str, Any]) -> tuple[int, ...]:
        """Four evenly spaced blocks, as dense heads on plain models take them."""
        depth = args.get("depth", 12)
        return tuple(sorted({max(depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4)}))

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        wanted, deepest = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: deepest + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return list(wanted)
