"""Options of segmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from anyres.options import Range, Sides, option
from anyres.tasks.options import DenseOptions, TestOptions


class SegmentConfig(DenseOptions):
    """Options of a segmentation run; defaults are those of UPerNet on ADE20K in 160k steps of 16 images."""

    head: Literal["upernet", "semantic_fpn", "segformer"] = option("upernet", "Head on the backbone.")
    model: str = option("resformer_small", "Backbone, a name from `anyres models`.")
    data: str = option("digits", "Training data: digits, a folder in ADE20K's layout, or hf:NAME.")
    num_classes: int | None = option(None, "Classes of masks whose folder does not name them.", ge=1)
    reduce_zero_label: bool | None = option(None, "Label 0 is ignored and the others move down (ADE20K: true).")
    mask_values: list[int] = option(
        [], "The number that masks store for each class, in order (black and white: 0,255)."
    )
    sizes: Sides = option([512], "Training crops in pixels, each a side or HEIGHTxWIDTH.")
    distillation: Literal["none", "smooth-l1", "l2", "cosine", "kl"] = option(
        "none", "Scale consistency: how a replica is compared with the next larger one."
    )
    distillation_target: Literal["gap"] = option("gap", "Scale consistency compares the mean of the last map.")
    epochs: int = option(127, "Passes over the training images.", ge=1)
    batch_size: int = option(16, "Images per optimiser step, over all processes and accumulated passes together.", ge=1)
    lr: float | None = option(6e-5, "Peak learning rate.", gt=0)
    weight_decay: float = option(0.01, "Weight decay; not for biases, norms and the model's no_weight_decay().", ge=0)
    decay: Literal["cosine", "linear", "poly", "step"] = option(
        "linear", "How the learning rate falls; poly has the power 0.9, step is 0.1 at each of `drops`."
    )
    warmup_epochs: float = option(1.2, "Epochs of linear warm-up.", ge=0)
    warmup_lr: float = option(1e-6, "Learning rate at the start of the warm-up (not scaled).", ge=0)
    min_lr: float = option(0.0, "Learning rate at the end (not scaled).", ge=0)
    scale: Range = option([0.5, 2.0], "Random scale: range of the image's short side over the crop's.")
    largest_share: float = option(
        0.75,
        "Training crops in which a class covers more than this are drawn again, up to ten times; 1: never.",
        gt=0,
        le=1,
    )
    photometric: bool = option(True, "Random brightness, contrast, saturation and hue.")
    longest: float = option(4.0, "Largest ratio of the long side to the short one; longer images get smaller.", ge=1)
    divisor: int = option(1, "Test: sides of images are rounded up to multiples of this (PVT, P2T, GPViT: 32).", ge=1)
    eval_every: int = option(
        10, "Epochs between validations at all training sizes; the last one always validates.", ge=1
    )
    eval_batch_size: int = option(1, "Images per process and pass in validation.", ge=1)


class SegmentationTest(TestOptions):
    """Options of a test of segmentation; see `predict_probabilities`."""

    scales: list[Annotated[float, Field(gt=0)]] = option(
        [1.0], "Factors at which every image is seen, such as 0.5,0.75,1,1.25,1.5,1.75."
    )
    flip: bool = option(False, "See every image mirrored, too.")
    window: int | None = option(None, "Side of a sliding window, instead of whole images.", ge=1)
    longest: float | None = option(
        None, "Largest ratio of the long side to the short one; otherwise as trained, or 4.", ge=1
    )
    divisor: int | None = option(
        None, "Sides of images are rounded up to multiples of this; otherwise as trained, or 1.", ge=1
    )
