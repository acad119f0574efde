"""Training and test options that tasks share; each task adds its own."""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from anyres.errors import UserError
from anyres.io.parsing import read_mapping
from anyres.options import Options, Range, Sides, option

Arguments = Annotated[dict[str, Any], BeforeValidator(read_mapping)]
"""Additional arguments of a function, by name."""


class TaskOptions(Options):
    """Options of every task: model, data, sizes."""

    model: str = option("resformer_tiny", "Architecture, a name from `anyres models`.")
    model_args: Arguments = option({}, "Additional arguments of create_model, such as {embed_dim: 96, depth: 4}.")
    data: str = option("digits", "Training data: digits, letters, a folder, hf:NAME, hf-stream:NAME or wds:PATTERN.")
    val_data: str | None = option(
        None, "Validation data, if not in `data`: its validation split, or all of it if it has no splits."
    )
    init_from: str | None = option(
        None, "Initialise from the weights of this run or checkpoint file (unlike resume, which continues a run)."
    )
    init_weights: Literal["auto", "raw", "averaged"] = option(
        "auto",
        "Weights to take from the file of init_from if it has raw and averaged ones: by default those that the authors "
        "of the model report results of.",
    )
    bit_depth: int | None = option(
        None,
        "Bits per channel of images with more than 8 bits, if the files do not say: 12, or 16 for dark images.",
        ge=1,
        le=32,
    )
    sizes: Sides = option([128, 160, 224], "Training sizes in pixels, each a side or HEIGHTxWIDTH.")
    separate_aug: bool = option(
        True, "Augment every replica independently; otherwise, smaller replicas are resized from the largest."
    )
    layer_decay: float | None = option(
        None, "Layer-wise learning-rate decay: factor from one layer to the one below it.", gt=0
    )
    drop_path: float = option(0.1, "Stochastic depth rate of the last block.", ge=0, lt=1)
    hflip: float = option(0.5, "Probability of a horizontal flip.", ge=0, le=1)
    eval_batch_size: int = option(128, "Validation batch size per process.", ge=1)
    seed: int = option(0, "Random seed.", ge=0)

    @model_validator(mode="after")
    def _together(self) -> Self:
        self.check()
        return self

    def check(self) -> None:
        """Raise UserError for values that do not go together, before anything is loaded."""

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Training sizes as (height, width), from large to small."""
        from anyres.data.schedule import parse_sizes  # imports torch

        shapes = dict.fromkeys(parse_sizes(",".join(map(str, self.sizes))))
        return sorted(shapes, key=lambda shape: -shape[0] * shape[1])

    @property
    def validation_data(self) -> tuple[str, bool]:
        """The location of the validation data, and whether it is separate from that of the training data.

        All items of separate validation data are used if it has no splits.
        """
        given = self.val_data
        return given or self.data, given is not None and os.path.realpath(given) != os.path.realpath(self.data)

    @property
    def unused_parameters(self) -> bool:
        """Whether a step may leave parameters without a gradient, which DDP needs to know."""
        return False


class LabelOptions(TaskOptions):
    """Options of tasks with one label per image or clip: crops, mixup and CutMix, label smoothing."""

    separate_mix: bool = option(False, "Draw mixup and CutMix for every replica independently.")
    crop_scale: Range = option([0.08, 1.0], "Random crop: range of its area relative to the image.")
    crop_ratio: Range = option([3 / 4, 4 / 3], "Random crop: range of its aspect ratio, width / height.")
    crop_fill: Literal["mean", "border"] = option(
        "mean",
        "Colour around images that are zoomed out (crop_scale above 1): the mean, or that of the image's border.",
    )
    interpolation: str = option("bicubic", "Interpolation for resizing, in training and validation.")
    auto_augment: str | None = option("rand-m9-mstd0.5-inc1", "RandAugment or AutoAugment policy as in timm.")
    color_jitter: float = option(0.3, "Colour jitter; not applied if auto_augment is set.", ge=0)
    erasing: float = option(0.25, "Probability of random erasing.", ge=0, le=1)
    mixup: float = option(0.8, "Mixup alpha; 0 turns it off.", ge=0)
    cutmix: float = option(1.0, "CutMix alpha; 0 turns it off.", ge=0)
    mix_prob: float = option(1.0, "Probability that a batch is mixed.", ge=0, le=1)
    switch_prob: float = option(0.5, "Probability of CutMix rather than mixup if both are on.", ge=0, le=1)
    smoothing: float = option(0.1, "Label smoothing.", ge=0, lt=1)


class DenseOptions(TaskOptions):
    """Options of tasks with a head on a dense backbone; each task sets its own defaults."""

    head: str = option("", "Head on the backbone.")
    head_args: Arguments = option({}, "Additional arguments of the head, such as {channels: 128}.")
    head_lr: float = option(1.0, "Learning-rate factor of the head.", gt=0)
    batch_norm: Literal["train", "sync", "frozen"] = option(
        "train",
        "Batch norm statistics: per process (train), over all processes (sync, GPUs only), or kept from init_from for "
        "the backbone (frozen).",
    )
    longest: float = option(
        4.0, "Largest ratio of the long side to the short side; longer images are scaled down to it.", ge=1
    )

    def check(self) -> None:
        super().check()
        if self.head_lr != 1 and self.layer_decay is not None:
            raise UserError(f"head_lr is {self.head_lr:g}, but layer_decay sets the rate of every layer; leave one out")


class TestOptions(Options):
    """Options of an evaluation besides size, device and batch size; each task adds its own."""

    __test__ = False  # not a test class for pytest
    of_results: ClassVar[tuple[str, ...]] = ()
    """Names of options that affect results but not scores."""

    def check_outputs(self) -> None:
        """Raise UserError if an output file would overwrite one that anyres did not write."""
