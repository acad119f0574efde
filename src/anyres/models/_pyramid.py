"""Skeleton of pyramids: stages of decreasing resolution and increasing width (Swin, PVT, CvT and others)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from anyres.layers.maps import depthwise, to_map, to_nchw, with_residual
from anyres.models._backbone import Backbone, take_indices
from anyres.options import Count, Rate, SideOrPair, WholeNumber
from anyres.shapes import Grid

Run = Callable[..., Any]


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return rates that rise linearly from 0 at the first block of the network to `rate` at the last, by stage."""
    total = sum(depths)
    flat = iter([rate * i / max(total - 1, 1) for i in range(total)])
    return [[next(flat) for _ in range(depth)] for depth in depths]


class Stage(nn.Module):
    """One resolution of a pyramid: `downsample` produces the map, the blocks process it, and `norm` follows.

    Most papers pass one map (B, H, W, C) from block to block and need only this class. Papers with a companion to the
    map (a class token, messenger tokens, a regional map), or with modules shared by the blocks of a stage, override
    `forward`.

    Args:
        downsample: module (B, H, W, C) → (B, h, w, C') with a method `grid(H, W) -> (h, w)`.
        blocks: modules that take and return the map.
        norm: applied to the map before the next stage and the outputs; an identity by default. It is always called, so
            a hook on it sees the stage's map.
    """

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm: nn.Module = norm if norm is not None else nn.Identity()

    def grid(self, height: int, width: int) -> Grid:
        """Return (h, w) of the stage's map, given the size of its input."""
        return self.downsample.grid(height, width)  # type: ignore[operator]

    def forward(self, x: Tensor, extra: Tensor | None, run: Run) -> tuple[Tensor, Tensor | None]:
        """Turn the (map, companion or None) of the previous stage into that of this stage.

        `run(block, *args)` calls a block, and recomputes it in the backward pass if gradient checkpointing is on.
        """
        x = self.downsample(x)
        for block in self.blocks:
            x = run(block, x)
        return self.norm(x), extra


class PositionedStage(Stage):
    """A stage with a position generator, x + depthwise(x), after its first block (CPVT; Twins, ScalableViT)."""

    def __init__(
        self, downsample: nn.Module, blocks: Iterable[nn.Module], dim: int, norm: nn.Module | None = None
    ) -> None:
        super().__init__(downsample, blocks, norm)
        self.position = depthwise(dim)

    def forward(self, x: Tensor, extra: Tensor | None, run: Run) -> tuple[Tensor, Tensor | None]:
        x = self.downsample(x)
        for i, block in enumerate(self.blocks):
            x = run(block, x)
            if i == 0:
                x = with_residual(self.position, x)
        return self.norm(x), extra


class Pyramid(Backbone):
    """A hierarchical transformer for any input size.

    Args, positional, set by the subclass:
        stages: the stages; the first takes the image as a map (B, H, W, in_chans).
        widths: channels of each stage's map.
        norm: norm before the head, or None.
        out_norms: norms of the maps that the dense form returns (the stages themselves do not use them), or None.

    Args, by keyword, set by the user:
        img_size: native size; it sets only the size of stored tables, if the model has any.
        global_pool: "avg" (mean over the map), "token" (the class token, if there is one), or "" (no pooling).
        dense: the form for detectors and segmenters, without a final norm and a head; `model(x)` returns the list of
            the stages' maps (B, C_i, h_i, w_i), as in the published dense code.
    """

    output_fmt = "NHWC"
    reductions: tuple[int, ...] = (4, 8, 16, 32)
    """Nominal stride of each stage."""
    no_decay: tuple[str, ...] = ()
    """Name fragments of parameters that published training excludes from weight decay, in addition to vectors."""

    def __init__(
        self,
        stages: Iterable[nn.Module],
        widths: Sequence[int],
        norm: nn.Module | None,
        out_norms: Iterable[nn.Module] | None = None,
        /,
        *,
        img_size: SideOrPair = 224,
        in_chans: Count = 3,
        num_classes: WholeNumber = 1000,
        global_pool: str | None = None,
        drop_rate: Rate = 0.0,
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.dense = dense
        self.embed_dim = widths[0]
        self.num_features = self.head_hidden_size = widths[-1]
        self.num_prefix_tokens = 0
        self.stages = nn.ModuleList(stages)
        self.norm: nn.Module = norm if norm is not None and not dense else nn.Identity()
        own_norms = out_norms if dense else None
        self.out_norms = nn.ModuleList([nn.Identity() for _ in widths] if own_norms is None else own_norms)
        map_name = "stages.{}.norm" if own_norms is None else "out_norms.{}"
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": map_name.format(i)}
            for i, (width, reduction) in enumerate(zip(widths, self.reductions, strict=True))
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.num_classes = num_classes
        self.global_pool = self.pools[0] if global_pool is None else global_pool
        self.reset_classifier(0 if dense else num_classes, self.global_pool)

    def use_maps(self, levels: Collection[int]) -> None:
        for level in range(len(self.out_norms)):
            if level not in levels:
                self.out_norms[level] = nn.Identity()

    # Forward --------------------------------------------------------------------------------------------------------

    def forward_stages(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield each stage's map (B, h, w, C) and its companion, as the next stage receives them.

        The companion is a class token (B, 1, C), messenger tokens or regions (B, h', w', C), or None.
        """
        self.check_size(x)
        x, extra = to_map(x), None
        for stage in self.stages:
            x, extra = stage(x, extra, self.run)
            yield x, extra

    def finish(self, x_BHWC: Tensor, extra: Tensor | None) -> Tensor:
        """Return the output of `forward_features`, here the normed map (B, h, w, C), from the last stage's outputs."""
        return self.norm(x_BHWC)

    def forward_features(self, x: Tensor) -> Tensor:
        *_, last = self.forward_stages(x)
        return self.finish(*last)

    def pool(self, features: Tensor) -> Tensor:
        """Pool the output of `forward_features` to (B, C) according to `global_pool`.

        Tokens (B, 1 + N, C) have the class token first.
        """
        if self.global_pool == "":
            return features
        return features[:, 0] if self.global_pool == "token" else self.mean_patch(features)

    def mean_patch(self, features: Tensor) -> Tensor:
        """Return the mean (B, C) over the map, or over the tokens after the class token."""
        return features.mean((1, 2)) if features.ndim == 4 else features[:, 1:].mean(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Any:
        """Return logits (B, num_classes), or in the dense form the list of maps (B, C_i, h_i, w_i)."""
        if self.dense:
            return self.forward_intermediates(x, intermediates_only=True)
        return self.forward_head(self.forward_features(x))

    def forward_train(self, x: Tensor, targets: Sequence[str] = ("cls",)) -> dict[str, Tensor]:
        features = self.forward_features(x)
        pooled = self.pool(features)
        logits = self.head(self.head_drop(pooled))
        out = {"logits": logits, "cls": pooled}
        if "gap" in targets:
            out["gap"] = self.mean_patch(features)
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
        wanted, deepest = take_indices(len(self.stages), indices, output_fmt)
        maps: list[Any] = []
        last: tuple[Tensor, Tensor | None] | None = None
        for i, last in enumerate(self.forward_stages(x)):
            if i in wanted:
                map_BHWC = self.out_norms[i](last[0])
                if norm and i == len(self.stages) - 1:
                    map_BHWC = self.norm(map_BHWC)
                out = to_nchw(map_BHWC) if output_fmt == "NCHW" else map_BHWC.flatten(1, -2)
                maps.append((out, last[1]) if return_prefix_tokens else out)
            if i == deepest and (stop_early or intermediates_only):
                break
        assert last is not None
        return maps if intermediates_only else (self.finish(*last), maps)

    def feature_sizes(self, height: int, width: int) -> list[Grid]:
        sizes = []
        for stage in self.stages:
            height, width = stage.grid(height, width)  # type: ignore[operator]
            sizes.append((height, width))
        return sizes

    # Head and training hooks ----------------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if any(part in name for part in self.no_decay)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^stages\.0\.downsample",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,)), (r"^norm", (99999,))],
        }

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        wanted, deepest = take_indices(len(self.stages), indices)
        self.stages = self.stages[: deepest + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return list(wanted)
