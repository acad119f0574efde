"""The data config: what a network states about its inputs and outputs, read in one place.

timm keeps this in `pretrained_cfg`, and so do we: `config.json` on disk has timm's entries under that name, and ours
(training sizes, clips, masks) under "anyres". All code that prepares inputs or names outputs uses a `DataConfig`.
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
    """How inputs are prepared for a network and what its outputs mean; created by `DataConfig.of`."""

    model: str
    """Name of the network in messages."""
    num_classes: int | None
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    train_sizes: tuple[Size, ...]
    minimum_size: int
    stride: int
    """Input pixels per cell of the coarsest feature map: sides that are multiples of it need no padding."""
    own_names: tuple[str, ...]
    """Output names that came with the weights; empty if there were none."""
    fitting: dict[str, Any]
    """How images are resized to a size with their aspect ratio kept, as far as the model states it.

    Arguments of `data.fitting.fit`: "longest", the largest aspect ratio, and "divisor".
    """
    masks: dict[str, Any]
    """How masks store classes: the arguments "reduce_zero_label" and "mask_values" of `open_segmentation`."""
    sampling: Sampling
    """How the frames of a clip are chosen."""
    statistics: str = ""
    """Origin of the mean and std if they are not the model's own."""

    @classmethod
    def of(cls, model: Any, source: Any = None) -> Self:
        """Read the data config of a model, ours or timm's, from `pretrained_cfg`, `in_chans`, `num_classes` and so on.

        Anything that the model does not state is taken from an open `source`, or else from ImageNet. This includes the
        mean and standard deviation if the stated ones are for a different number of channels than the model takes.
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
        clip = re.search(r"_(\d+)x(\d+)$", architecture)  # published video networks are named like mvitv2_small_16x4
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
            stride=max((int(level["reduction"]) for level in getattr(backbone, "feature_info", ())), default=1),
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
        """Return the mean and std as text, with their origin if they are not the model's own."""
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        whose = f" of {self.statistics}, as the model states none that fit" if self.statistics else ""
        return f"mean {mean}, std {std}{whose}"

    def tell_borrowed(self) -> None:
        """Log whose mean and standard deviation are used for normalisation if the model states none.

        Scores are too low if they differ from those that the model was trained with.
        """
        if self.statistics:
            logger.warning("images for the model %s are normalised with %s", self.model, self.normalisation)

    @property
    def size(self) -> Size:
        """The largest size that the model was trained at. Raises UserError if it states none."""
        if not self.train_sizes:
            raise UserError(f"the model {self.model} does not state what size it was trained at: give a size")
        return max(self.train_sizes, key=lambda size: size[0] * size[1])

    def check_size(self, size: Size) -> None:
        """Raise UserError if `size` is below the model's minimum, since images would be silently enlarged or padded."""
        if min(size) < self.minimum_size:
            raise UserError(
                f"size {size[0]}x{size[1]} is below the model's minimum: give sides of at least {self.minimum_size}"
            )

    @property
    def label_names(self) -> list[str]:
        """Names of the outputs: the model's own, or ImageNet's if the number of classes matches, or else numbers.

        Raises UserError if the number of the model's own names differs from the number of outputs.
        """
        count = len(self.own_names) if self.num_classes is None else int(self.num_classes)
        if self.own_names and len(self.own_names) != count:
            raise UserError(
                f"the model {self.model} states {len(self.own_names)} names for its {count} outputs: give them in"
                " names=FILE"
            )
        return list(self.own_names) or imagenet_words(count) or [str(number) for number in range(count)]

    def places(self, source: Any, fix: str = NAMES_FILE) -> Tensor:
        """Return, for each class of the source, the index of the matching model output, int64 (K,).

        Classes are matched by name and never by position: against the model's own names, or as in `match_outputs` if it
        has none. Raises UserError, ending in `fix`, if a class has no match.
        """
        whose = {"knower": f"the model {self.model}", "namer": source.name, "fix": fix}
        if self.own_names:
            return torch.tensor(match_classes(self.label_names, source.label_names, **whose))
        count = len(source.label_names) if self.num_classes is None else int(self.num_classes)
        return torch.tensor(match_outputs(count, source.label_names, **whose))
