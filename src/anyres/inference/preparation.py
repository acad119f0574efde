"""What a model states about its inputs and outputs: preprocessing, sizes, clips, names of the classes."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anyres.data import Source
from anyres.data.classes import NAMES_FILE, imagenet_words, match_classes, match_outputs
from anyres.data.clips import Sampling
from anyres.data.schedule import Size
from anyres.data.sources import STATISTICS
from anyres.errors import UserError
from anyres.models._backbone import pair
from anyres.tasks import task_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """How images are made ready for a model: published preprocessing with the model's own constants where it states
    them.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    in_chans: int
    statistics: str = "the model"
    """Whose mean and std these are."""

    def __str__(self) -> str:
        rule = f"{self.interpolation} resize of the short side to int(size/{self.crop_pct:.4g}), centre crop to size"
        other = "non-square sizes: resized to cover (height, width) divided by the same number, then the centre crop"
        return f"{rule}; {other}; {self.normalisation}."

    @property
    def normalisation(self) -> str:
        """The mean and std in words, and whose they are where the model does not state them."""
        whose = "" if self.statistics == "the model" else f" of {self.statistics}, as the model states none that fit"
        return f"mean {_numbers(self.mean)}, std {_numbers(self.std)}{whose}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def preparation_for(model: nn.Module, source: Source | None = None) -> Preparation:
    """Read the model's `pretrained_cfg` (ours or timm's); what it does not state comes from the source, or, for images
    that are of no data set, is ImageNet's.

    So do the mean and standard deviation when those stated are for another number of channels than the model takes.
    Raises UserError for a model of neither 1 nor 3 channels where there is no source.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    in_chans = input_channels(model, default=3 if source is None else source.in_chans)
    own = all(len(cfg.get(name) or ()) == in_chans for name in ("mean", "std"))
    if own:
        mean, std, whose = cfg["mean"], cfg["std"], "the model"
    elif source is not None:
        mean, std, whose = source.mean, source.std, source.name
    elif in_chans in STATISTICS:
        (mean, std), whose = STATISTICS[in_chans], "ImageNet"
    else:
        raise UserError(f"{_title(model)} takes {in_chans} channels, but images have 1 or 3: use a model for these")
    return Preparation(
        mean=tuple(mean),
        std=tuple(std),
        crop_pct=cfg.get("crop_pct") or (0.875 if source is None else source.crop_pct),
        interpolation=cfg.get("interpolation") or "bicubic",
        in_chans=in_chans,
        statistics=whose,
    )


def tell_borrowed(model: nn.Module, source: Source | None = None) -> None:
    """Say in the log whose mean and standard deviation images are normalised with, if they are not the model's own:
    with others than it was trained with its scores are too low."""
    way = preparation_for(model, source)
    if way.statistics != "the model":
        logger.warning("images for %s are normalised with %s", _title(model), way.normalisation)


def input_channels(model: nn.Module, default: int = 3) -> int:
    """Colour channels that the model takes: its attribute `in_chans`, else those of `pretrained_cfg["input_size"]`,
    else `default`.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    channels = getattr(model, "in_chans", None) or (cfg.get("input_size") or (default,))[0]
    return int(channels)


def check_size(model: nn.Module, size: Size) -> None:
    """Raises UserError for a size below the model's minimum, which images would otherwise be enlarged or padded to."""
    minimum = getattr(model, "minimum_size", 1)
    if min(size) < minimum:
        raise UserError(f"size {size[0]}x{size[1]} is below the model's minimum: give sides of at least {minimum}")


def default_size(model: nn.Module) -> tuple[int, int]:
    """The largest size that the model was trained at."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    sizes = [pair(size) for size in cfg.get("train_sizes") or []]
    return max(sizes, key=lambda size: size[0] * size[1]) if sizes else pair(tuple(cfg["input_size"])[1:])


def train_sizes(model: nn.Module) -> list[Size]:
    """The sizes that a model was trained at: `pretrained_cfg["train_sizes"]`, else the one of
    `pretrained_cfg["input_size"]`.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    sizes = cfg.get("train_sizes") or [cfg["input_size"][1:]] if cfg.get("input_size") or cfg.get("train_sizes") else []
    return [(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])) for size in sizes]


def fitting_of(model: Any) -> dict[str, Any]:
    """How images are fitted to a size where their ratio is kept, as arguments of `fit` and of a task's evaluation: the
    largest ratio of the sides ("longest") and, for segmentation, the "divisor" that the model was trained with, as far
    as they are known."""
    names = {"segmentation": ("longest", "divisor"), "detection": ("longest",)}.get(task_of(model), ())
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return {name: cfg[name] for name in names if cfg.get(name) is not None}


def sampling_of(model: Any) -> Sampling:
    """The clips that a model was trained with: "num_frames" and "frame_stride" of its `pretrained_cfg`, those in the
    name of a published video network (mvitv2_small_16x4), else its own `num_frames`, every fourth."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    named = re.search(r"_(\d+)x(\d+)$", str(getattr(model, "architecture", None)))
    frames, stride = map(int, named.groups()) if named else (8, 4)
    frames = cfg.get("num_frames") or getattr(model, "num_frames", None) or frames
    return Sampling(int(frames), float(cfg.get("frame_stride") or stride))


def label_names(model: nn.Module) -> list[str]:
    """Names of the model's outputs: stored with the weights, else ImageNet's for as many classes, else numbers. Raises
    UserError for more or fewer stored names than outputs."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    count = int(getattr(model, "num_classes", len(names or ())))
    if names and len(names) != count:
        raise UserError(f"{_title(model)} states {len(names)} names for its {count} outputs: give them in names=FILE")
    return list(names) if names else imagenet_words(count) or [str(i) for i in range(count)]


def label_places(model: nn.Module, source: Source, fix: str = NAMES_FILE) -> Tensor:
    """For each class of the source the output of the model that means it, (K,) int64.

    Classes are matched by name, never by position: by the model's `label_names`, or as `match_outputs` does for a model
    without. Raises UserError, which ends in `fix`, where a class has no match.
    """
    whose = {"knower": _title(model), "namer": source.name, "fix": fix}
    if (getattr(model, "pretrained_cfg", None) or {}).get("label_names"):
        return torch.tensor(match_classes(label_names(model), source.label_names, **whose))
    count = int(getattr(model, "num_classes", len(source.label_names)))
    return torch.tensor(match_outputs(count, source.label_names, **whose))


def _title(model: nn.Module) -> str:
    return f"the model {getattr(model, 'architecture', None) or type(model).__name__}"
