"""Options that training for a task needs, whatever the task; each task has more of its own."""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from anyres.errors import UserError
from anyres.io.parsing import read_mapping
from anyres.options import Options, Range, Sides, option

Arguments = Annotated[dict[str, Any], BeforeValidator(read_mapping)]
"""Further arguments of a function, by name."""


class TaskOptions(Options):
    """What a task is trained on: model, data, sizes."""

    model: str = option("resformer_tiny", "Architecture, a name from `anyres models`.")
    model_args: Arguments = option({}, "Further arguments of create_model, such as {embed_dim: 96, depth: 4}.")
    data: str = option("digits", "Training data: digits, a folder, hf:NAME, hf-stream:NAME or wds:PATTERN.")
    val_data: str | None = option(
        None, "Validation data, if not the other split of `data`: its validation split, or all."
    )
    init_from: str | None = option(
        None, "Start from the weights of this run or checkpoint file; not the same as resume."
    )
    bit_depth: int | None = option(
        None, "Bits of pictures of more than 8 bits, where the files do not say: 12, or 16 for dark ones.", ge=1, le=32
    )
    sizes: Sides = option([128, 160, 224], "Training sizes in pixels, each a side or HEIGHTxWIDTH.")
    separate_aug: bool = option(True, "Augment every replica on its own; otherwise small ones are resized large ones.")
    layer_decay: float | None = option(None, "Learning rate factor from one layer to the one below it.", gt=0)
    drop_path: float = option(0.1, "Stochastic depth of the last block.", ge=0, lt=1)
    hflip: float = option(0.5, "Probability of a horizontal flip.", ge=0, le=1)
    eval_batch_size: int = option(128, "Images per process and pass in validation.", ge=1)
    seed: int = option(0, "Seed of everything random.", ge=0)

    @model_validator(mode="after")
    def _together(self) -> Self:
        self.check()
        return self

    def check(self) -> None:
        """Refuse values that do not go together, before anything is loaded. Raises UserError."""

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Training sizes as (height, width), large to small."""
        from anyres.data.schedule import parse_sizes  # with torch behind it

        shapes = dict.fromkeys(parse_sizes(",".join(map(str, self.sizes))))
        return sorted(shapes, key=lambda shape: -shape[0] * shape[1])

    @property
    def validation_data(self) -> tuple[str, bool]:
        """Where the validation data are, and whether they are for nothing else: then all of them are read where they
        have no splits. Those of the training data are not, whichever option names them."""
        given = self.val_data
        return given or self.data, given is not None and os.path.realpath(given) != os.path.realpath(self.data)

    @property
    def unused_parameters(self) -> bool:
        """Whether a step may leave parameters without a gradient, which DDP has to be told."""
        return False


class LabelOptions(TaskOptions):
    """Options of runs whose images or clips carry one label: crops, mixing, smoothing."""

    separate_mix: bool = option(False, "Draw mixup/CutMix for every replica on its own.")
    crop_scale: Range = option([0.08, 1.0], "Random crop: range of its share of the image's area.")
    crop_ratio: Range = option([3 / 4, 4 / 3], "Random crop: range of width / height.")
    crop_fill: Literal["mean", "border"] = option(
        "mean", "What surrounds images that are zoomed out (crop_scale beyond 1): the mean colour or the border's."
    )
    interpolation: str = option("bicubic", "Interpolation of resizes, in training and validation.")
    auto_augment: str | None = option("rand-m9-mstd0.5-inc1", "timm's RandAugment/AutoAugment policy.")
    color_jitter: float = option(0.3, "Colour jitter; inactive together with auto_augment.", ge=0)
    erasing: float = option(0.25, "Probability of random erasing.", ge=0, le=1)
    mixup: float = option(0.8, "Mixup alpha; 0 switches it off.", ge=0)
    cutmix: float = option(1.0, "CutMix alpha; 0 switches it off.", ge=0)
    mix_prob: float = option(1.0, "Probability that a batch is mixed.", ge=0, le=1)
    switch_prob: float = option(0.5, "Probability of CutMix where both are on.", ge=0, le=1)
    smoothing: float = option(0.1, "Label smoothing.", ge=0, lt=1)


class DenseOptions(TaskOptions):
    """Options of runs with a head on a dense backbone; a task gives those without a default here their own."""

    head: str = option("", "Head on the backbone.")
    head_args: Arguments = option({}, "Further arguments of the head, such as {channels: 128}.")
    head_lr: float = option(1.0, "Learning rate factor of the head.", gt=0)
    batch_norm: Literal["train", "sync", "frozen"] = option(
        "train",
        "Batch norms: statistics of a process' own images, of all processes' (GPUs), or the backbone's from init_from.",
    )
    longest: float = option(4.0, "Largest ratio of the long side to the short one; longer images get smaller.", ge=1)

    def check(self) -> None:
        super().check()
        if self.head_lr != 1 and self.layer_decay is not None:
            raise UserError(f"head_lr is {self.head_lr:g}, but layer_decay gives every layer its rate; leave one out")


class TestOptions(Options):
    """Options of an evaluation, besides size, device and batch; each task has more of its own."""

    __test__ = False  # for pytest: it is none
    of_results: ClassVar[tuple[str, ...]] = ()
    """Options that change what results hold, and no score."""

    def check_outputs(self) -> None:
        """Raises UserError for a file to write that anyres must not replace."""
