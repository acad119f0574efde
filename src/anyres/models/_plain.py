"""Skeleton of plain transformers (ViT and its descendants): one token grid, one width, prefix tokens first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from timm.layers import Mlp
from torch import Tensor, nn

from anyres.errors import UserError
from anyres.layers.attention import Attention, Block
from anyres.layers.hooks import is_watched
from anyres.layers.init import init_linear
from anyres.layers.maps import to_map, to_nchw
from anyres.layers.patch_embed import PatchEmbed, Remainder, patches_of
from anyres.layers.positions import (
    AbsoluteTable,
    AxialRotary,
    ContinuousBias,
    FieldsOfView,
    FunctionalBias,
    GlobalPositionEmbedding,
    LocalPositionEmbedding,
    LogitBias,
    LogScale,
    ParabolicBias,
    QueryKeyMap,
    RelativeBiasTable,
    SineMap,
)
from anyres.models._backbone import Backbone, DetectorForm, pair, take_indices
from anyres.options import Count, Depth, Factor, Options, Range, Rate, SideOrPair, WholeNumber, option
from anyres.shapes import Grid


class Position(Options):
    """The combination of position encodings in a plain model, at most one for each point where they can act."""

    tokens: Literal["table", "sine", "gpe"] | None = option(None, "What is added to the tokens once.")
    resize: Literal["bicubic", "bilinear"] = option("bicubic", "How the table of tokens=table is resized.")
    logits: Literal["table", "continuous", "fire", "lookhere", "pape", "pape_ri"] | None = option(
        None, "What is added to the attention's logits."
    )
    rotary: bool = option(False, "Queries and keys are rotated by their coordinates.")
    local: bool = option(False, "A convolution of the values is added to the attention's output.")
    jitter: Range | None = option(None, "In training the coordinates of rotary are scaled by a factor from this range.")
    log_scale: Literal["fixed", "learnt", "clamped"] | None = option(
        None, "Queries are scaled by the logarithm of the number of tokens (see LogScale)."
    )

    @model_validator(mode="after")
    def _jitter_has_coordinates(self) -> Self:
        if self.jitter is not None and not self.rotary:
            raise UserError(f"jitter={self.jitter} scales the coordinates of rotary=True: add that, or set jitter=None")
        return self

    @property
    def acts_between_tokens(self) -> bool:
        """Whether the attention itself has to know the positions, of all tokens at once."""
        return self.logits is not None or self.rotary or self.log_scale is not None


POSITIONS = {
    "none": Position(),
    "ape": Position(tokens="table"),
    "ape_bilinear": Position(tokens="table", resize="bilinear"),
    "sine": Position(tokens="sine"),
    "gpe": Position(tokens="gpe"),
    "lpe": Position(local=True),
    "glpe": Position(tokens="gpe", local=True),
    "rpb": Position(logits="table"),
    "cpb": Position(logits="continuous"),
    "fire": Position(logits="fire"),
    "lookhere": Position(logits="lookhere"),
    "pape": Position(logits="pape"),
    "pape_ri": Position(logits="pape_ri"),
    "rope": Position(rotary=True),
    "rlpe": Position(rotary=True, local=True, jitter=[0.75, 1.25], log_scale="fixed"),
}
"""Position encodings by name: the rows of ResFormer's ablation (Table 5), newer biases of the logits, rotary positions,
and rotary + LPE."""


def choose_position(name: str, args: Mapping[str, Any] | None = None) -> Position:
    """The position of this name, with other values for some of its fields."""
    if name not in POSITIONS:
        raise UserError(f"position={name!r} is not known: choose one of {', '.join(POSITIONS)}.")
    fields = Position.model_fields
    if not isinstance(args or {}, Mapping) or not fields.keys() >= (args or {}).keys():
        raise UserError(f"position_args={args!r:.200} must map names to values; there are {', '.join(fields)}.")
    try:
        return POSITIONS[name].changed(**(args or {}))
    except UserError as error:
        raise UserError(f"In position_args of position={name!r}, {error}.") from None


def window_divisions(windows: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Return one division per block, from the name of a UViT schedule (section 3.3) or from a list.

    The sides of a block's attention windows are the grid's sides divided by it.
    """
    if windows == "global":
        return (1,) * depth
    if windows == "constant":
        return (2,) * depth
    if windows == "progressive":  # 14, 2 and 2 of the 18 blocks
        return tuple(4 if 9 * i < 7 * depth else 2 if 9 * i < 8 * depth else 1 for i in range(depth))
    if isinstance(windows, str) or len(windows) != depth or min(windows) < 1:
        raise UserError(
            f"windows={windows!r} is not known: choose 'global', 'constant', 'progressive' or one division of the grid "
            f"(1: global) for each of the {depth} blocks."
        )
    return tuple(windows)


WINDOWED: dict[str, Any] = {"dense": True, "prefix_tokens": (), "global_pool": "avg", "window_size": 14}
"""The dense form of ViTDet (Li et al., ECCV 2022, section 3): no class token, 14x14 windows in all but four blocks."""


class Plain(Backbone):
    """A plain transformer for any input size.

    Args, positional, set by the subclass:
        patch_embed: module (B, in_chans, H, W) → (B, C, h, w) with a method `grid(H, W) -> (h, w)`; `patch_size` then
            only states its stride.
        blocks: modules that take tokens, the grid and the other inputs of `layers.attention`, and return tokens.

    Args, by keyword, set by the user:
        img_size: native size, a side or (height, width); it sets only the size of stored position tables.
        patch_size: side of a patch in pixels; `remainder` ("pad" or "truncate") controls sides that are not a multiple.
        stride: side of the patches that images are cut into, if not `patch_size`. The stored kernel (resized to the
            stride) and the native grid keep `patch_size`.
        position: a name in `POSITIONS`.
        position_args: other values for fields of that `Position`, such as {"jitter": None} to leave a part out.
        windows: "global"; "constant": windows of half the grid's sides; "progressive": quarters, halves, global
            (UViT+); or one division per block. Prefix tokens attend to, and are attended to by, every token.
        window_size: window side in tokens for all blocks but the last of each quarter, which are global (ViTDet). There
            are no prefix tokens then. 0 or None turns windows off.
        prefix_tokens: names of the learned tokens put before the patches, in order.
        dense: the form for detectors and segmenters, without a head; `model(x)` returns the list of maps (B, C, h, w)
            of the levels in `default_out_indices`, the last one normed.
        global_pool: "token" (first prefix token), "avg" (mean patch token), or "" (no pooling).
    """

    output_fmt = "NLC"
    pools: tuple[str, ...] = ("token", "avg", "")
    detector = DetectorForm("vitdet", "simple", "pyramid")

    def __init__(
        self,
        patch_embed: nn.Module | None = None,
        blocks: Iterable[nn.Module] | None = None,
        /,
        img_size: SideOrPair = 224,
        patch_size: Count = 16,
        in_chans: Count = 3,
        num_classes: WholeNumber = 1000,
        global_pool: str = "token",
        embed_dim: Count = 768,
        depth: Depth = 12,
        num_heads: Count = 12,
        mlp_ratio: Factor = 4.0,
        qkv_bias: bool = True,
        position: str = "ape",
        position_args: Mapping[str, Any] | None = None,
        windows: str | Sequence[Count] = "global",
        window_size: WholeNumber | None = None,
        prefix_tokens: Sequence[str] = ("cls_token",),
        stride: Count | None = None,
        remainder: Remainder = "pad",
        drop_rate: Rate = 0.0,
        proj_drop_rate: Rate = 0.0,
        attn_drop_rate: Rate = 0.0,
        drop_path_rate: Rate = 0.0,
        dense: bool = False,
    ) -> None:
        super().__init__()
        choice = choose_position(position, position_args)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.minimum_size = stride or patch_size
        self.num_prefix_tokens = len(prefix_tokens)
        self.prefix_names = tuple(prefix_tokens)

        self.patch_embed = patch_embed or PatchEmbed(stride or patch_size, in_chans, embed_dim, remainder, patch_size)
        for name in self.prefix_names:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, embed_dim)))
        native_grid = patches_of(*pair(img_size), patch_size, remainder)
        head_dim = embed_dim // num_heads
        self.position = self._token_position(choice, native_grid)
        native_tokens = self.num_prefix_tokens + native_grid[0] * native_grid[1]
        self.rotary = AxialRotary(head_dim, self.num_prefix_tokens, jitter=choice.jitter) if choice.rotary else None
        self.log_scale = LogScale(native_tokens, choice.log_scale) if choice.log_scale else None
        quarters = Plain.default_out_indices({"depth": depth})
        divisions = window_divisions(windows, depth)
        if blocks is None:
            blocks = (
                Block(
                    embed_dim,
                    Attention(
                        embed_dim,
                        num_heads,
                        qkv_bias,
                        attn_drop_rate,
                        proj_drop_rate,
                        bias=self._logit_position(choice, num_heads, native_grid, i, depth),
                        parabolas=ParabolicBias(num_heads, head_dim, choice.logits == "pape_ri")
                        if choice.logits in ("pape", "pape_ri")
                        else None,
                        local=LocalPositionEmbedding(head_dim) if choice.local else None,
                        window=None if i in quarters else window_size or None,
                        division=divisions[i],
                    ),
                    Mlp(embed_dim, int(embed_dim * mlp_ratio), drop=proj_drop_rate),
                    drop_path_rate * i / max(depth - 1, 1),
                )
                for i in range(depth)
            )
        self.blocks = nn.ModuleList(blocks)
        depth = len(self.blocks)
        if set(divisions) != {1} and choice.acts_between_tokens:
            raise UserError(f"windows={windows!r} does not go with position={position!r}: choose 'ape' or 'glpe'.")
        if window_size and (prefix_tokens or choice.acts_between_tokens or set(divisions) != {1}):
            raise UserError(
                f"window_size={window_size} needs prefix_tokens=(), windows='global' and a position that is not "
                "between tokens, such as 'ape' or 'glpe'."
            )
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": stride or patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.apply(init_linear)
        for name in self.prefix_names:
            nn.init.trunc_normal_(getattr(self, name), std=0.02)
        if not self.prefix_names:
            self.pools = tuple(name for name in self.pools if name != "token")
        self.dense = dense
        self.dense_levels = self.default_out_indices({"depth": depth})
        self.out_norms = nn.ModuleList(nn.Identity() for _ in self.dense_levels[:-1])
        self.reset_classifier(0 if dense else num_classes, global_pool)

    def _token_position(self, choice: Position, native_grid: Grid) -> AbsoluteTable | SineMap | None:
        if choice.tokens == "table":
            return AbsoluteTable(self.embed_dim, native_grid, self.num_prefix_tokens, choice.resize)
        if choice.tokens is None:
            return None
        kind = SineMap if choice.tokens == "sine" else GlobalPositionEmbedding
        return kind(self.embed_dim, self.num_prefix_tokens)

    @staticmethod
    def _logit_position(choice: Position, heads: int, native_grid: Grid, block: int, depth: int) -> LogitBias | None:
        match choice.logits:
            case "table":
                return RelativeBiasTable(heads, native_grid)
            case "continuous":
                return ContinuousBias(heads, native_grid)
            case "fire":
                return FunctionalBias(heads, native_grid)
            case "lookhere":
                return FieldsOfView(heads, block, depth)
        return None

    @property
    def dense_info(self) -> list[dict[str, Any]]:
        return [self.feature_info[level] for level in self.dense_levels]

    def make_maps_alike(self) -> None:
        if any(isinstance(norm, nn.Identity) for norm in self.out_norms):
            self.norm = nn.Identity()

    # Forward --------------------------------------------------------------------------------------------------------

    def embed(self, x: Tensor) -> tuple[Tensor, Grid, tuple[QueryKeyMap, ...]]:
        """Return (tokens (B, prefix + h·w, C) with token positions added, grid (h, w), what every attention applies to
        its queries and keys)."""
        self.check_size(x)
        patches = self.patch_embed(x)
        grid = (patches.shape[-2], patches.shape[-1])
        tokens = patches.flatten(2).transpose(1, 2)
        if self.prefix_names:
            prefix = [getattr(self, name).expand(x.shape[0], -1, -1) for name in self.prefix_names]
            tokens = torch.cat([*prefix, tokens], dim=1)
        if isinstance(self.position, AbsoluteTable):
            tokens = tokens + self.position(grid)
        elif self.position is not None:
            tokens = tokens + self.position(grid, tokens)
        transforms: list[QueryKeyMap] = []
        if self.rotary is not None:
            transforms.append(self.rotary(grid, tokens))
        if self.log_scale is not None:
            transforms.append(self.log_scale(tokens))
        return tokens, grid, tuple(transforms)

    def through_blocks(
        self,
        tokens: Tensor,
        grid: Grid,
        transforms: tuple[QueryKeyMap, ...],
        levels: Sequence[int] = (),
        count: int | None = None,
        queries: int | None = None,
        run: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the first `count` blocks (default: all); returns their output, and the outputs of the blocks `levels`.

        With `queries`, the last block computes only that many first rows. `run(block, tokens, *context)` replaces the
        model's own `run`.
        """
        run = run or self.run
        kept = []
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if i == count:
                break
            tokens = run(block, tokens, grid, transforms, queries if i == last else None)
            if i in levels:
                kept.append(tokens)
        return tokens, kept

    def encode(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Return tokens after the final norm (B, N, C).

        With `queries`, the last block computes only that many first rows.
        """
        tokens, _ = self.through_blocks(*self.embed(x), queries=queries)
        return self.norm(tokens)

    def rows_read(self) -> int | None:
        """Return how many first tokens the head reads, so that the last block can compute only those; None for all.

        It is None if hooks watch that block or the norm after it, so that what they see does not depend on the head.
        """
        if self.global_pool != "token" or is_watched(self.blocks[-1], self.norm):
            return None
        return self.num_prefix_tokens

    def forward_features(self, x: Tensor) -> Tensor:
        return self.encode(x)

    def forward(self, x: Tensor) -> Any:
        """Return logits (B, num_classes), or in the dense form the list of maps (B, C, h, w).

        If the head reads only prefix tokens, the last block does not compute the patches.
        """
        if self.dense:
            maps = self.forward_intermediates(x, self.dense_levels, intermediates_only=True)
            norms: list[nn.Module] = [*self.out_norms, self.norm]
            return [to_nchw(norm(to_map(map_))) for norm, map_ in zip(norms, maps, strict=True)]
        return self.forward_head(self.encode(x, self.rows_read()))

    def pool(self, x_BNC: Tensor) -> Tensor:
        """Pool tokens (B, N, C) to (B, C) according to `global_pool`."""
        if self.global_pool == "avg":
            return x_BNC[:, self.num_prefix_tokens :].mean(1)
        return x_BNC[:, 0] if self.global_pool == "token" else x_BNC

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward_train(self, x: Tensor, targets: Sequence[str] = ("cls",)) -> dict[str, Tensor]:
        tokens = self.encode(x, None if "gap" in targets else self.rows_read())
        out = {"logits": self.forward_head(tokens), "cls": self.pool(tokens)}
        if "gap" in targets:
            out["gap"] = tokens[:, self.num_prefix_tokens :].mean(1)
        return out

    def feature_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        return [self.patch_embed.grid(height, width)] * len(self.feature_info)  # type: ignore[operator]

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
        tokens, grid, transforms = self.embed(x)
        count = deepest + 1 if stop_early or intermediates_only else None
        tokens, collected = self.through_blocks(tokens, grid, transforms, wanted, count)
        if norm:
            collected = [self.norm(t) for t in collected]
        patches = [t[:, self.num_prefix_tokens :] for t in collected]
        if output_fmt == "NCHW":  # a channels-last view, no copy
            patches = [p.unflatten(1, grid).permute(0, 3, 1, 2) for p in patches]
        features: list[Any] = patches
        if return_prefix_tokens:
            features = list(zip(patches, [t[:, : self.num_prefix_tokens] for t in collected], strict=True))
        return features if intermediates_only else (self.norm(tokens), features)

    # Head and training hooks ----------------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        own = ("position.", "log_scale.")
        in_blocks = (".attn.local.", ".attn.bias.", ".attn.parabolas.")
        return {
            name
            for name, _ in self.named_parameters()
            if name in self.prefix_names or name.startswith(own) or any(part in name for part in in_blocks)
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": rf"^(?:{'|'.join((*self.prefix_names, 'position', 'log_scale', 'patch_embed'))})",
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
        """Return four evenly spaced blocks, as dense heads on plain models use them."""
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
