"""Action recognition on clips (B, C, T, H, W): image backbones with divided space–time attention, and video networks.

Frames go through the image model as a batch. Before every block, the tokens at each position attend to each other over
time. The temporal branch is initialised to zero, so a new network equals the image model on single frames.

Source: TimeSformer ("Is Space-Time Attention All You Need for Video Understanding?", ICML 2021, arXiv 2102.05095) as
used by ResFormer (section 4.4), reimplemented from the papers without copying released code.
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
    """Temporal branch of a block: FC(DropPath(Attn(LN(x)))) over the frames at every position.

    Norm and attention are initialised as copies of the block's own, and FC to zero. Without `fc`, the output projection
    of the attention is initialised to zero instead.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, drop_path: nn.Module, fc: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.drop_path = drop_path
        self.fc: nn.Module = nn.Linear(dim, dim) if fc else nn.Identity()

    def start_from(self, norm: nn.Module, attn: nn.Module) -> None:
        """Copy a block's norm and the linear layers of its attention, and set the last layer of this branch to zero."""
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

    Each frame is embedded with a class token and position embedding, and a learned time embedding per frame, `time`, is
    added to the patch tokens. In every block, the patch tokens at each position first attend to each other over time.
    Then the tokens of each frame attend to each other; the class token is copied to every frame, and its residuals are
    averaged over the frames. The MLP follows. Local position encoding is used only in the spatial attention. The input
    of the head is the class token or, without one, the mean of all patch tokens.

    Clips may have any number of frames: `num_frames` is the size of the table of time embeddings, which is resized to
    the nearest rows for other clips. Height and width may be any that the backbone supports.

    Raises UserError for a backbone that has no such form and for `num_frames` below 1.
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
        """Build the video form of a registered image model, given by name.

        Raises UserError for an unknown name or option, and for a model that has no video form.
        """
        cls.check_options(options)
        model = cls.dense_backbone(backbone, backbone_args or {}, options)
        return (RegionTime if isinstance(model, RegionViT) else SpaceTime)(model, num_classes, **options)

    @classmethod
    def dense_backbone(cls, name: str, args: dict[str, Any], options: dict[str, Any]) -> Backbone:
        """Build the image classifier without its head."""
        return cast(Backbone, create_model(resolve_name(name), **{"num_classes": 0, **args}))

    def new_temporal(self) -> nn.ModuleList:
        """Build the temporal branch of every block, in order. Raises UserError for a backbone without a video form."""
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
        """Initialise the temporal branches as copies of the backbone's attention, with zero output."""
        for temporal, block in zip(self.temporal, cast(Any, self.backbone).blocks, strict=True):
            cast(TemporalAttention, temporal).start_from(block.norm1, block.attn)

    def load_image_weights(self, path: str | Path, ema: bool | None = None) -> LoadReport:
        """Load the weights file of an image model into the backbone, then call `start_from_space`. The head is kept.

        Raises:
            FileNotFoundError: if the file does not exist.
            UserError: if the file is damaged or belongs to another model.
        """
        report = load_checkpoint(self.backbone, path, strict=False, ema=ema)
        lacking = report.missing + report.mismatched
        if lacking:
            raise UserError(f"{path} does not fit the backbone ({report}): choose the model that it was made with.")
        self.start_from_space()
        return report

    def init_scaled(self) -> None:
        """As for every model, but `time` has σ = 0.5, because from zero the order of frames would be learned last."""
        init_scaled(self)
        nn.init.trunc_normal_(self.time, std=0.5)

    # Forward --------------------------------------------------------------------------------------------------------

    def encode(self, frames: Tensor, count: int, gap: bool) -> tuple[Tensor, Tensor | None]:
        """Return the input of the head for each frame and, with `gap`, the mean patch token: (B·T, C) each.

        The mean over a clip's frames (which may be equal) is the input of the head for the clip.

        Args:
            frames: frames of clips (B·T, C, H, W).
            count: the number of frames per clip, T.
            gap: whether to return the mean patch token.
        """
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
        """Run a block with temporal and spatial attention on tokens (B·T, prefix + N, C).

        Prefix tokens are equal in all frames of a clip, before and after the block.
        """
        prefix = self.backbone.num_prefix_tokens
        y = temporal(tokens.unflatten(0, (-1, count))[:, :, prefix:])
        tokens = tokens + F.pad(y, (0, 0, prefix, 0)).flatten(0, 1)
        y = block.drop_path1(block.attn(block.norm1(tokens), *context)).unflatten(0, (-1, count))
        if prefix:
            first = y[:, :, :prefix].mean(1, keepdim=True).expand(-1, count, -1, -1)
            y = torch.cat((first, y[:, :, prefix:]), dim=2)
        tokens = tokens[:, : y.shape[2]] + y.flatten(0, 1)
        # Drop path acts per clip, because its frames share one class token.
        y = block.mlp(block.norm2(tokens)).unflatten(0, (-1, count)).flatten(1, 2)
        return tokens + block.drop_path2(y).view(tokens.shape)

    def runner(self, count: int) -> Callable[..., Tensor]:
        """Return a function that replaces the backbone's call of a block by `step` with the next temporal branch."""
        parts: Iterator[nn.Module] = chain.from_iterable(
            part if isinstance(part, nn.ModuleList) else (part,) for part in self.temporal
        )

        def run(block: nn.Module, tokens: Tensor, *context: Any) -> Tensor:
            return self.backbone.run(self.step, block, next(parts), count, tokens, *context)

        return run

    def time_at(self, count: int) -> Tensor:
        """Return the time embeddings for clips of `count` frames, (1, T, C)."""
        return F.interpolate(self.time.mT, count, mode="nearest").mT

    def pool(self, x: Tensor, gap: bool) -> tuple[Tensor, Tensor | None]:
        """Return the input of the head for clips (B, C, T, H, W) and, with `gap`, the mean patch token: (B, D) each."""
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
        """Return the outputs for clips (B, in_chans, T, H, W), by name.

        These are "logits" (B, num_classes), "cls", the input of the head (B, D), and with "gap" in `targets` also
        "gap", the mean patch token of all frames after the final norm (B, D).
        """
        pooled, gap = self.pool(x, "gap" in targets)
        logits = self.classify(pooled)
        out = {"logits": logits, "cls": pooled}
        return out if gap is None else {**out, "gap": gap}

    def parts_to_shard(self) -> Iterator[nn.Module]:
        """Yield the temporal branches and each block's attention and MLP, because blocks are not called as a whole."""
        yield from self.temporal
        for block in cast(Any, self.backbone).blocks:
            yield from (block.attn, block.mlp)

    # Training hooks -------------------------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"time"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns: the backbone's layers, each with its temporal branch, then the head."""
        groups = super().group_matcher(coarse)
        groups["stem"] = f"{groups['stem']}|^time$"
        groups["blocks"].insert(0, (r"^temporal\.(\d+)", None))
        return groups


class RegionTime(SpaceTime):
    """RegionViT on clips (our own design; there is no published code or result).

    In every block, before the regional step, the regional and local tokens at each position attend to each other over
    time; the output projection of that attention is initialised to zero. A learned time embedding per frame is added to
    both maps of the first stage, because otherwise the order of the frames would have no effect. The input of the head
    is the mean regional token of all frames.
    """

    def new_temporal(self) -> nn.ModuleList:
        """Build the temporal branches, one list per stage."""
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
        """Run a block on the tokens of the local windows (B·T, R, 1 + w·w, C)."""
        y = temporal(tokens.flatten(1, 2).unflatten(0, (-1, count)))
        return block(tokens + y.flatten(0, 1).view(tokens.shape), *context)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        groups = super().group_matcher(coarse)
        if not coarse:
            groups["blocks"][0] = (r"^temporal\.(\d+)\.(\d+)", None)
        return groups


def mean_over_views(logits: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the mean class probabilities over a video's views, given their logits (B, K)."""
    return torch.stack(list(logits)).float().log_softmax(-1).logsumexp(0) - math.log(len(logits))


def video_networks() -> list[str]:
    """Return the names of the registered models that are video networks."""
    return [name for name, entry in entries().items() if "num_frames" in entry.variant.args]


def create_video_model(name: str, num_classes: int, num_frames: int | None = None, **args: Any) -> SpaceTime | Backbone:
    """Build a video classifier by the name of a registered model: an MViTv2 video network, or a `SpaceTime` model.

    `SpaceTime` models can be built from plain models and RegionViT.

    Args:
        num_frames: size of the time embeddings; by default as published, or 8 for `SpaceTime`.
        args: arguments of the backbone.

    Raises:
        UserError: for unknown names and options, and for models without a video form.
    """
    name = resolve_name(name)
    options: dict[str, Any] = {} if num_frames is None else {"num_frames": num_frames}
    if name in video_networks():
        return cast(Backbone, create_model(name, num_classes=num_classes, **options, **args))
    return SpaceTime.build(name, num_classes, args, **options)
