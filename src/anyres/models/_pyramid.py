"""Skeleton of the pyramids: stages of falling resolution and growing width (Swin, PVT, CvT and the rest)."""

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
    """Rates rising linearly from 0 at the first block of the network to `rate` at the last, grouped by stage."""
    total = sum(depths)
    flat = iter([rate * i / max(total - 1, 1) for i in range(total)])
    return [[next(flat) for _ in range(depth)] for depth in depths]


class Stage(nn.Module):
    """One resolution of a pyramid: `downsample` brings the map to it, the blocks work on it, `norm` ends it.

    Most papers hand one map (B, H, W, C) from block to block and need nothing more than this class. A paper with a
    companion to the map (a class token, messengers, a regional map) or with modules that the blocks of a stage share
    overrides `forward`.

    Args:
        downsample: module (B, H, W, C) → (B, h, w, C') with a method `grid(H, W) -> (h, w)`.
        blocks: modules that take and return the map.
        norm: what the next stage and the outputs get the map through; nothing by default. It is called in any case:
            what it returns is the stage's map, the place for a hook.
    """

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm: nn.Module = norm if norm is not None else nn.Identity()

    def grid(self, height: int, width: int) -> Grid:
        """(h, w) of the stage's map, given the size of its input."""
        return self.downsample.grid(height, width)  # type: ignore[operator]

    def forward(self, x: Tensor, extra: Tensor | None, run: Run) -> tuple[Tensor, Tensor | None]:
        """(map, companion or None) of the stage before → of this stage. `run(block, *args)` calls a block, and
        recomputes it in the backward pass if gradient checkpointing is on."""
        x = self.downsample(x)
        for block in self.blocks:
            x = run(block, x)
        return self.norm(x), extra


class PositionedStage(Stage):
    """A stage whose first block is followed by a position generator: x + depthwise(x), once per stage (CPVT; Twins,
    ScalableViT)."""

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

    Args, by position and from the subclass:
        stages: the stages; the first takes the image as a map (B, H, W, in_chans).
        widths: channels of each stage's map.
        norm: norm before the head; None for none.
        out_norms: norms of the maps that the dense form hands out (they do not feed back); None for none.

    Args, by keyword and from the user:
        img_size: native size: the size of stored tables, where a model has any, and nothing else.
        global_pool: "avg" (mean over the map), "token" (the class token, where there is one), or "" (none).
        dense: the form that detectors and segmenters take: no final norm, no head; `model(x)` returns the list of the
            stages' maps (B, C_i, h_i, w_i), as the published dense code hands them out.
    """

    output_fmt = "NHWC"
    reductions: tuple[int, ...] = (4, 8, 16, 32)
    """Nominal stride of each stage."""
    no_decay: tuple[str, ...] = ()
    """Fragments of names of parameters that published training spares from weight decay, besides vectors."""

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
        """Image → for each stage its map (B, h, w, C) and its companion (a class token (B, 1, C), messengers or regions
        (B, h', w', C), or None), as the next stage gets them."""
        self.check_size(x)
        x, extra = to_map(x), None
        for stage in self.stages:
            x, extra = stage(x, extra, self.run)
            yield x, extra

    def finish(self, x_BHWC: Tensor, extra: Tensor | None) -> Tensor:
        """Map and companion of the last stage → what `forward_features` returns: here the normed map (B, h, w, C)."""
        return self.norm(x_BHWC)

    def forward_features(self, x: Tensor) -> Tensor:
        *_, last = self.forward_stages(x)
        return self.finish(*last)

    def pool(self, features: Tensor) -> Tensor:
        """What `forward_features` returns → (B, C) as `global_pool` says. Tokens (B, 1 + N, C) have the class token
        first."""
        if self.global_pool == "":
            return features
        return features[:, 0] if self.global_pool == "token" else self.mean_patch(features)

    def mean_patch(self, features: Tensor) -> Tensor:
        """The mean over the map, or over the tokens behind the class token: (B, C)."""
        return features.mean((1, 2)) if features.ndim == 4 else features[:, 1:].mean(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Any:
        """(B, in_chans, H, W) → (B, num_classes); in the dense form the list of maps (B, C_i, h_i, w_i)."""
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
