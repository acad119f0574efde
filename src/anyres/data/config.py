"""What a network states about its inputs and its outputs, read in one place.

timm keeps it in `pretrained_cfg`, and so do we: `config.json` on disk has timm's entries under that name and ours
(training sizes, clips, masks) under "anyres". Everything that prepares inputs or names outputs asks a `DataConfig`.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from anyres.data.base import CROP_PCT, STATISTICS
from anyres.data.classes import NAMES_FILE, imagenet_words, match_classes, match_outputs
from anyres.data.clips import Sampling
from anyres.errors import UserError
from anyres.shapes import Size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """How inputs are prepared for a network and what its outputs mean; see `DataConfig.of`."""

    model: str
    """What messages call the network."""
    num_classes: int | None
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    train_sizes: tuple[Size, ...]
    minimum_size: int
    own_names: tuple[str, ...]
    """Names of the outputs that came with the weights; empty where none did."""
    fitting: dict[str, Any]
    """How images whose ratio is kept are fitted to a size, as far as it is stated: arguments "longest", the largest
    ratio of the sides, and "divisor" of `data.fitting.fit`."""
    masks: dict[str, Any]
    """How masks store classes: arguments "reduce_zero_label" and "mask_values" of `open_segmentation`."""
    sampling: Sampling
    """The frames of a clip."""
    statistics: str = ""
    """Whose mean and std these are, where they are not the model's own."""

    @classmethod
    def of(cls, model: Any, source: Any = None) -> Self:
        """What the attributes `pretrained_cfg`, `in_chans`, `num_classes`, … of a model state, ours or timm's.

        What it does not state comes from an open `source`, or else is ImageNet's: also the mean and standard deviation
        where those stated are for another number of channels than the model takes.
        """
        cfg = {name: value for name, value in (getattr(model, "pretrained_cfg", None) or {}).items() if value}
        size = cfg.get("input_size")
        stated = size[0] if size else getattr(source, "in_chans", 3)
        in_chans = int(getattr(model, "in_chans", None) or stated)
        if all(len(cfg.get(name, ())) == in_chans for name in ("mean", "std")):
            mean, std, whose = cfg["mean"], cfg["std"], ""
        elif source is not None and source.in_chans == in_chans:
            mean, std, whose = source.mean, source.std, source.name
        elif in_chans in STATISTICS:
            (mean, std), whose = STATISTICS[in_chans], "ImageNet"
        else:
            raise UserError(f"the model takes {in_chans} channels, but images have 1 or 3: use a model for these")
        sizes = cfg.get("train_sizes") or ([size[1:]] if size else [])
        backbone = getattr(model, "backbone", model)
        architecture = str(getattr(backbone, "architecture", None) or type(backbone).__name__).removeprefix("anyres_")
        clip = re.search(r"_(\d+)x(\d+)$", architecture)  # as published video networks are named: mvitv2_small_16x4
        frames, stride = map(int, clip.groups()) if clip else (8, 4)
        return cls(
            model=architecture,
            num_classes=getattr(model, "num_classes", None),
            in_chans=in_chans,
            mean=tuple(mean),
            std=tuple(std),
            crop_pct=float(cfg.get("crop_pct", getattr(source, "crop_pct", CROP_PCT))),
            interpolation=cfg.get("interpolation", "bicubic"),
            train_sizes=tuple(
                (each, each) if isinstance(each, int) else (int(each[0]), int(each[1])) for each in sizes
            ),
            minimum_size=getattr(model, "minimum_size", 1),
            own_names=tuple(cfg.get("label_names", ())),
            fitting={name: cfg[name] for name in ("longest", "divisor") if name in cfg},
            masks={
                "reduce_zero_label": (getattr(model, "pretrained_cfg", None) or {}).get("reduce_zero_label"),
                "mask_values": cfg.get("mask_values", ()),
            },
            sampling=Sampling(
                int(cfg.get("num_frames") or getattr(model, "num_frames", None) or frames),
                float(cfg.get("frame_stride", stride)),
            ),
            statistics=whose,
        )

    @property
    def normalisation(self) -> str:
        """The mean and std in words, and whose they are where the model does not state them."""
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        whose = f" of {self.statistics}, as the model states none that fit" if self.statistics else ""
        return f"mean {mean}, std {std}{whose}"

    def tell_borrowed(self) -> None:
        """Say in the log whose mean and standard deviation images are normalised with, if they are not the model's own:
        with others than it was trained with its scores are too low."""
        if self.statistics:
            logger.warning("images for the model %s are normalised with %s", self.model, self.normalisation)

    @property
    def size(self) -> Size:
        """The largest size that the model was trained at. Raises UserError if it states none."""
        if not self.train_sizes:
            raise UserError(f"the model {self.model} does not state what size it was trained at: give a size")
        return max(self.train_sizes, key=lambda size: size[0] * size[1])

    def check_size(self, size: Size) -> None:
        """Raises UserError for a size below the model's minimum, which images would otherwise be enlarged or padded
        to."""
        if min(size) < self.minimum_size:
            raise UserError(
                f"size {size[0]}x{size[1]} is below the model's minimum: give sides of at least {self.minimum_size}"
            )

    @property
    def label_names(self) -> list[str]:
        """Names of the model's outputs: its own, else ImageNet's for as many classes, else numbers. Raises UserError
        for more or fewer of its own than outputs."""
        count = len(self.own_names) if self.num_classes is None else int(self.num_classes)
        if self.own_names and len(self.own_names) != count:
            raise UserError(
                f"the model {self.model} states {len(self.own_names)} names for its {count} outputs: give them in"
                " names=FILE"
            )
        return list(self.own_names) or imagenet_words(count) or [str(number) for number in range(count)]

    def places(self, source: Any, fix: str = NAMES_FILE) -> Tensor:
        """For each class of the source the output of the model that means it, (K,) int64.

        Classes are matched by name, never by position: by the model's own names, or as `match_outputs` does for a model
        without. Raises UserError, which ends in `fix`, where a class has no match.
        """
        whose = {"knower": f"the model {self.model}", "namer": source.name, "fix": fix}
        if self.own_names:
            return torch.tensor(match_classes(self.label_names, source.label_names, **whose))
        count = len(source.label_names) if self.num_classes is None else int(self.num_classes)
        return torch.tensor(match_outputs(count, source.label_names, **whose))
