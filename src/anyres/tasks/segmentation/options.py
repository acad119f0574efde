"""Options of segmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from anyres.options import Range, Sides, option
from anyres.tasks.options import DenseOptions, TestOptions


class SegmentConfig(DenseOptions):
    """Options for training segmentation; the defaults are for UPerNet on ADE20K with 160k steps of 16 images."""

    head: Literal["upernet", "semantic_fpn", "segformer"] = option("upernet", "Head on the backbone.")
    model: str = option("resformer_small", "Backbone, a name from `anyres models`.")
    data: str = option("digits", "Training data: digits, a folder in ADE20K's layout, or hf:NAME.")
    num_classes: int | None = option(None, "Number of classes, if the folder of the masks does not name them.", ge=1)
    reduce_zero_label: bool | None = option(None, "Ignore label 0 and subtract 1 from the others (ADE20K: true).")
    mask_values: list[int] = option(
        [], "The value in the masks for each class, in order (black and white masks: 0,255)."
    )
    sizes: Sides = option([512], "Training crops in pixels, each a side or HEIGHTxWIDTH.")
    distillation: Literal["none", "smooth-l1", "l2", "cosine", "kl"] = option(
        "none", "Scale consistency: the loss between each replica and the next larger one."
    )
    distillation_target: Literal["gap"] = option("gap", "Scale consistency: compare the mean of the last map.")
    epochs: int = option(127, "Passes over the training images.", ge=1)
    batch_size: int = option(
        16, "Images per optimiser step, summed over all processes and gradient accumulation steps.", ge=1
    )
    lr: float | None = option(6e-5, "Peak learning rate.", gt=0)
    weight_decay: float = option(
        0.01, "Weight decay; biases, norms and the model's no_weight_decay() are exempt.", ge=0
    )
    decay: Literal["cosine", "linear", "poly", "step"] = option(
        "linear", "Shape of the learning-rate decay. poly has power 0.9; step multiplies by 0.1 at each of `drops`."
    )
    warmup_epochs: float = option(1.2, "Epochs of linear warm-up.", ge=0)
    warmup_lr: float = option(1e-6, "Learning rate at the start of warm-up (not scaled with the batch size).", ge=0)
    min_lr: float = option(0.0, "Final learning rate (not scaled with the batch size).", ge=0)
    scale: Range = option([0.5, 2.0], "Random scale: range of the image's short side relative to the crop's.")
    largest_share: float = option(
        0.75,
        "Redraw a training crop, up to ten times, if a class covers more than this fraction of it; 1 turns this off.",
        gt=0,
        le=1,
    )
    photometric: bool = option(True, "Randomly change brightness, contrast, saturation and hue.")
    longest: float = option(
        4.0, "Largest ratio of the long side to the short side; longer images are scaled down to it.", ge=1
    )
    divisor: int = option(1, "Testing: round the sides of images up to multiples of this (PVT, P2T, GPViT: 32).", ge=1)
    eval_every: int = option(
        10, "Validate at all training sizes every this many epochs, and always after the last one.", ge=1
    )
    eval_batch_size: int = option(1, "Validation batch size per process.", ge=1)


class SegmentationTest(TestOptions):
    """Options for evaluating segmentation; see `predict_probabilities`."""

    scales: list[Annotated[float, Field(gt=0)]] = option(
        [1.0], "Scales to average over for every image, such as 0.5,0.75,1,1.25,1.5,1.75."
    )
    flip: bool = option(False, "Also average over horizontally flipped images.")
    window: int | None = option(
        None, "Side of the tiles for sliding-window inference; by default, use whole images.", ge=1
    )
    longest: float | None = option(
        None, "Largest ratio of the long side to the short side; by default as in training, or 4.", ge=1
    )
    divisor: int | None = option(
        None, "Round the sides of images up to multiples of this; by default as in training, or 1.", ge=1
    )
