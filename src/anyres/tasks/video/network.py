"""Action recognition: image backbones on clips (B, C, T, H, W) by divided space–time attention, and video networks.

Frames go through the image model as a batch; before every block the tokens of one place attend to each other over time.
A fresh network is the image model on single frames: what time adds starts at zero.

Source: TimeSformer ("Is Space-Time Attention All You Need for Video Understanding?", ICML 2021, arXiv 2102.05095) as
ResFormer uses it (section 4.4), rebuilt from the papers; neither is a copy of released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.errors import UserError
from anyres.layers.attention import Attention, Block
from anyres.layers.init import init_scaled
from anyres.layers.maps import to_map
from anyres.models._backbone import Backbone
from anyres.models._checkpoints import LoadReport, load_checkpoint
from anyres.models._plain import Plain
from anyres.models._registry import create_model, entries, resolve_name
from anyres.models.regionvit import RegionalToLocalBlock, RegionViT
from anyres.tasks.network import TaskModel, blocks_of


class TemporalAttention(nn.Module):
    """What time adds to a block's input: FC(DropPath(Attn(LN(x)))) over the frames at every place.

    Norm and attention start as copies of the block's own, FC at zero. Without `fc` the attention's output projection
    takes its part.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, drop_path: nn.Module, fc: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.drop_path = drop_path
        self.fc: nn.Module = nn.Linear(dim, dim) if fc else nn.Identity()

    def start_from(self, norm: nn.Module, attn: nn.Module) -> None:
        """Copy a block's norm and the linear layers of its attention; the last layer here becomes zero."""
        self.norm.load_state_dict(norm.state_dict())
        linear = {name: weights for name, weights in attn.state_dict().items() if name.startswith(("qkv.", "proj."))}
        self.attn.load_state_dict(linear)
        for parameter in (self.attn.proj if isinstance(self.fc, nn.Identity) else self.fc).parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BTNC: Tensor) -> Tensor:
        """(…, T, N, C) → (…, T, N, C)."""
        x_BNTC = x_BTNC.transpose(-3, -2)
        frames = x_BNTC.shape[-2]
        y = self.attn(self.norm(x_BNTC.flatten(0, -3)), (1, frames))
        return self.fc(self.drop_path(y)).view(x_BNTC.shape).transpose(-3, -2)


class SpaceTime(TaskModel):
    """A plain image model with divided space–time attention (ResFormer, section 4.4; TimeSformer, section 3).

    Each frame is embedded with its class token and positions; a learned vector per frame, `time`, is added to patch
    tokens. In every block, first the patch tokens of a place attend to each other over time; then each frame attends
    within itself, the class token copied to every frame and its residuals averaged over them; then the feed-forward
    network. Local positions act in the frames' attention only. The head reads the class token; without one, the mean
    over all patch tokens.

    Clips may have any number of frames: `num_frames` sizes the table of time, which other clips read at the nearest
    rows. Any height and width that the backbone takes.

    Errors: UserError for a backbone that has no such form and for `num_frames` below 1.
    """

    task = "video"

    def __init__(self, backbone: Backbone, num_classes: int, num_frames: int = 8) -> None:
        super().__init__(backbone, num_classes, num_frames=num_frames)
        if num_frames < 1:
            raise UserError(f"num_frames is {num_frames}; a clip has at least 1 frame.")
        self.num_frames = num_frames
        self.time = nn.Parameter(torch.zeros(1, num_frames, backbone.embed_dim))
        self.temporal = self.new_temporal()
        self.head = backbone.new_head(num_classes)
        self.start_from_space()

    @classmethod
    def build(
        cls, backbone: str, num_classes: int, backbone_args: dict[str, Any] | None = None, /, **options: Any
    ) -> SpaceTime:
        """The video form of a registered image model, by its name. Errors: UserError for a name or an option that does
        not exist, and for models that have no such form."""
        cls.check_options(options)
        model = cls.dense_backbone(backbone, backbone_args or {}, options)
        return (RegionTime if isinstance(model, RegionViT) else SpaceTime)(model, num_classes, **options)

    @classmethod
    def dense_backbone(cls, name: str, args: dict[str, Any], options: dict[str, Any]) -> Backbone:
        """The image classifier without its head."""
        return cast(Backbone, create_model(resolve_name(name), **{"num_classes": 0, **args}))

    def new_temporal(self) -> nn.ModuleList:
        """The temporal part of every block, in their order."""
        blocks: list[Any] = list(self.backbone.blocks) if isinstance(self.backbone, Plain) else []
        temporal = nn.ModuleList()
        for block in blocks:
            if type(block) is not Block or type(block.attn) is not Attention:
                break
            attn = block.attn
            width = attn.proj.in_features
            bias = attn.qkv.bias is not None
            temporal.append(TemporalAttention(width, attn.num_heads, bias, block.drop_path1, fc=True))
        if not blocks or len(temporal) < len(blocks):
            name = str(self.backbone.architecture or type(self.backbone).__name__).removeprefix("anyres_")
            raise UserError(
                f"{name} has no video form: choose a plain model (resformer_*, deit_*, uvit_*), regionvit_* or one of "
                f"{', '.join(video_networks())}."
            )
        return temporal

    def start_from_space(self) -> None:
        """Make the temporal parts copies of the backbone's attention, and what they add zero."""
        for temporal, block in zip(self.temporal, cast(Any, self.backbone).blocks, strict=True):
            cast(TemporalAttention, temporal).start_from(block.norm1, block.attn)

    def load_image_weights(self, path: str | Path) -> LoadReport:
        """Start from an image model: its weights file, published or own, then `start_from_space`. The head stays.

        Errors: FileNotFoundError; UserError for a damaged file or weights of another model.
        """
        report = load_checkpoint(self.backbone, path, strict=False)
        lacking = report.missing + report.mismatched
        if lacking:
            raise UserError(f"{path} does not fit the backbone ({report}): choose the model that it was made with.")
        self.start_from_space()
        return report

    def init_scaled(self) -> None:
        """As for every model; time is normal with σ = 0.5, since from zero the order of frames is learned last."""
        init_scaled(self)
        nn.init.trunc_normal_(self.time, std=0.5)

    # Forward --------------------------------------------------------------------------------------------------------

    def encode(self, frames: Tensor, count: int, gap: bool) -> tuple[Tensor, Tensor | None]:
        """Frames of clips (B·T, C, H, W), `count` = T → of each frame the vector that the head reads, the same or the
        mean of which is the clip's, and with `gap` the mean patch token: (B·T, C) each."""
        backbone: Any = self.backbone
        prefix = backbone.num_prefix_tokens
        tokens, grid, rotation = backbone.embed(frames)
        time = self.time_at(count)[:, :, None].expand(-1, -1, grid[0] * grid[1], -1)
        tokens = (tokens.unflatten(0, (-1, count)) + F.pad(time, (0, 0, prefix, 0))).flatten(0, 1)
        queries = None if gap else backbone.rows_read()
        tokens, _ = backbone.through_blocks(tokens, grid, rotation, queries=queries, run=self.runner(count))
        tokens = backbone.norm(tokens)
        return backbone.pool(tokens), tokens[:, prefix:].mean(1) if gap else None

    def step(self, block: Any, temporal: nn.Module, count: int, tokens: Tensor, *context: Any) -> Tensor:
        """A block of space and time on the frames' tokens (B·T, prefix + N, C). Prefix rows are equal in all frames of
        a clip before and after it."""
        prefix = self.backbone.num_prefix_tokens
        y = temporal(tokens.unflatten(0, (-1, count))[:, :, prefix:])
        tokens = tokens + F.pad(y, (0, 0, prefix, 0)).flatten(0, 1)
        y = block.drop_path1(block.attn(block.norm1(tokens), *context)).unflatten(0, (-1, count))
        if prefix:
            first = y[:, :, :prefix].mean(1, keepdim=True).expand(-1, count, -1, -1)
            y = torch.cat((first, y[:, :, prefix:]), dim=2)
        tokens = tokens[:, : y.shape[2]] + y.flatten(0, 1)
        # Dropped per clip, as its frames share one class token.
        y = block.mlp(block.norm2(tokens)).unflatten(0, (-1, count)).flatten(1, 2)
        return tokens + block.drop_path2(y).view(tokens.shape)

    def runner(self, count: int) -> Callable[..., Tensor]:
        """What calls a block in the backbone's place: `step` with the temporal part whose turn it is."""
        parts: Iterator[nn.Module] = chain.from_iterable(
            part if isinstance(part, nn.ModuleList) else (part,) for part in self.temporal
        )

        def run(block: nn.Module, tokens: Tensor, *context: Any) -> Tensor:
            return self.backbone.run(self.step, block, next(parts), count, tokens, *context)

        return run

    def time_at(self, count: int) -> Tensor:
        """The table of time for clips of `count` frames: (1, T, C)."""
        return F.interpolate(self.time.mT, count, mode="nearest").mT

    def pool(self, x: Tensor, gap: bool) -> tuple[Tensor, Tensor | None]:
        """Clips (B, C, T, H, W) → the vector that the head reads, and with `gap` the mean patch token: (B, D) each."""
        self.backbone.check_clip(x)
        count = x.shape[2]
        pooled, mean = self.encode(x.transpose(1, 2).flatten(0, 1), count, gap)
        clips = [None if part is None else part.unflatten(0, (-1, count)).mean(1) for part in (pooled, mean)]
        return cast(Tensor, clips[0]), clips[1]

    def classify(self, pooled: Tensor) -> Tensor:
        drop = cast(nn.Module, self.backbone.head_drop)
        return self.head(drop(pooled))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, T, H, W) → (B, num_classes)."""
        return self.classify(self.pool(x, gap=False)[0])

    def forward_train(self, x: Tensor, targets: Sequence[str] = ("cls",)) -> dict[str, Tensor]:
        """ "logits"; "cls", the vector that enters the head; and if asked for "gap", the mean patch
        token of all frames after the final norm: (B, D)."""
        pooled, gap = self.pool(x, "gap" in targets)
        logits = self.classify(pooled)
        out = {"logits": logits, "cls": pooled}
        return out if gap is None else {**out, "gap": gap}

    def parts_to_shard(self) -> Iterator[nn.Module]:
        """A block is not called as a whole: its attention, its feed-forward network and the temporal part are."""
        yield from self.temporal
        for block in cast(Any, self.backbone).blocks:
            yield from (block.attn, block.mlp)

    # Training hooks -------------------------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"time"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The backbone's layers, each temporal part with its block, then the head."""
        groups = super().group_matcher(coarse)
        groups["stem"] = f"{groups['stem']}|^time$"
        groups["blocks"].insert(0, (r"^temporal\.(\d+)", None))
        return groups


class RegionTime(SpaceTime):
    """RegionViT on clips (a design of this library: there is no published code or number).

    In every block, before the regional step, the tokens of a place attend to each other over time, regional ones and
    local ones; the output projection of that attention starts at zero. A learned vector per frame is added to both maps
    of the first stage: without it, nothing would tell one order of the frames from another. The head reads the mean
    regional token of all frames.
    """

    def new_temporal(self) -> nn.ModuleList:
        """One list per stage."""
        stages = nn.ModuleList()
        for stage in self.stages:
            parts = nn.ModuleList()
            for block in stage.blocks:
                assert isinstance(block, RegionalToLocalBlock)
                width = block.attn.proj.in_features
                parts.append(TemporalAttention(width, block.attn.num_heads, True, block.drop_path, fc=False))
            stages.append(parts)
        return stages

    @property
    def stages(self) -> Any:
        return self.backbone.stages

    def start_from_space(self) -> None:
        for parts, stage in zip(self.temporal, self.stages, strict=True):
            for temporal, block in zip(cast(nn.ModuleList, parts), stage.blocks, strict=True):
                cast(TemporalAttention, temporal).start_from(block.norm0, block.attn)

    def encode(self, frames: Tensor, count: int, gap: bool) -> tuple[Tensor, Tensor | None]:
        backbone: Any = self.backbone
        backbone.check_size(frames)
        time = self.time_at(count)[:, :, None, None]

        run = self.runner(count)
        first, *others = self.stages
        both = first.enter(to_map(frames), None)
        x, regional = first.mix(*((map_.unflatten(0, (-1, count)) + time).flatten(0, 1) for map_ in both), run)
        for stage in others:
            x, regional = stage(x, regional, run)
        pooled = backbone.pool(backbone.finish(x, regional))
        return pooled, backbone.mean_patch(backbone.norm(x)) if gap else None

    def parts_to_shard(self) -> Iterator[nn.Module]:
        return chain(*cast(Any, self.temporal), blocks_of(self.backbone))

    def step(self, block: Any, temporal: nn.Module, count: int, tokens: Tensor, *context: Any) -> Tensor:
        """A block on the windows' tokens (B·T, R, 1 + w·w, C)."""
        y = temporal(tokens.flatten(1, 2).unflatten(0, (-1, count)))
        return block(tokens + y.flatten(0, 1).view(tokens.shape), *context)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        groups = super().group_matcher(coarse)
        if not coarse:
            groups["blocks"][0] = (r"^temporal\.(\d+)\.(\d+)", None)
        return groups


def mean_over_views(logits: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean softmax scores of a clip's views, from their logits (B, K) each."""
    return torch.stack(list(logits)).float().log_softmax(-1).logsumexp(0) - math.log(len(logits))


def video_networks() -> list[str]:
    """Names of the registered models that take clips by themselves."""
    return [name for name, entry in entries().items() if "num_frames" in entry.variant.args]


def create_video_model(name: str, num_classes: int, num_frames: int | None = None, **args: Any) -> SpaceTime | Backbone:
    """A classifier of clips by the name of a registered model: MViTv2's video networks as they are, plain models and
    RegionViT as `SpaceTime`.

    `num_frames` sizes tables of time (default: as published, 8 for `SpaceTime`); `args` go to the backbone.
    Errors: UserError for unknown names and options, and for models without a video form.
    """
    name = resolve_name(name)
    options: dict[str, Any] = {} if num_frames is None else {"num_frames": num_frames}
    if name in video_networks():
        return cast(Backbone, create_model(name, num_classes=num_classes, **options, **args))
    return SpaceTime.build(name, num_classes, args, **options)
