"""Options of action recognition."""

from __future__ import annotations

from typing import Literal

from anyres.options import option
from anyres.tasks.options import LabelOptions, TestOptions


class VideoConfig(LabelOptions):
    """Options for training on video; the defaults are those of ResFormer in TimeSformer, as far as published."""

    model: str = option("resformer_base", "A plain backbone (divided space-time attention) or a video network.")
    data: str = option("digits", "Training data: digits, or a folder in Kinetics' layout (CLASS folders or CSV).")
    frames: int = option(8, "Frames per clip.", ge=1)
    stride: float = option(32.0, "Temporal stride between the frames of a clip, in source frames at 30 fps.", gt=0)
    epochs: int = option(15, "Passes over the training clips.", ge=1)
    batch_size: int = option(
        64, "Clips per optimiser step, summed over all processes and gradient accumulation steps.", ge=1
    )
    optimizer: str = option("sgd", "Name of an optimiser in timm.optim.")
    lr: float | None = option(5e-3, "Peak learning rate.", gt=0)
    weight_decay: float = option(
        1e-4, "Weight decay; biases, norms and the model's no_weight_decay() are exempt.", ge=0
    )
    decay: Literal["cosine", "linear", "poly", "step"] = option(
        "step", "Shape of the learning-rate decay. poly has power 0.9; step multiplies by 0.1 at each of `drops`."
    )
    drops: list[float] = option([11, 14], "With decay=step, the epochs after which the learning rate is divided by 10.")
    warmup_epochs: float = option(0.0, "Epochs of linear warm-up.", ge=0)
    interpolation: str = option("bilinear", "Interpolation for resizing, in training and validation.")
    mixup: float = option(0.0, "Mixup alpha; 0 turns it off.", ge=0)
    cutmix: float = option(0.0, "CutMix alpha; 0 turns it off.", ge=0)
    smoothing: float = option(0.0, "Label smoothing.", ge=0, lt=1)
    auto_augment: str | None = option(None, "RandAugment or AutoAugment policy as in timm, the same for all frames.")
    erasing: float = option(0.0, "Probability of random erasing.", ge=0, le=1)
    crop_pct: float = option(1.0, "Validation: centre crop / resized short side (MViTv2: 0.875).", gt=0, le=1)
    eval_batch_size: int = option(16, "Validation batch size (clips) per process.", ge=1)


class VideoTest(TestOptions):
    """Options for evaluating video; see `ClipTest` and `Sampling`."""

    of_results = ("topk",)

    clips: int = option(1, "Number of evenly spaced clips per video.", ge=1)
    crops: int = option(1, "Spatial crops per clip: 1 (centre) or 3 (along the long side).")
    frames: int | None = option(None, "Frames per clip; by default as in training.", ge=1)
    stride: float | None = option(None, "Temporal stride in source frames at 30 fps; by default as in training.", gt=0)
    segments: bool = option(
        False, "Divide the video into as many equal segments as frames and take one from each (Something-Something v2)."
    )
    crop_pct: float | None = option(
        None, "Centre crop / resized short side; by default the model's, and 1 with three crops.", gt=0, le=1
    )
    topk: int = option(5, "Number of classes in a result.", ge=1)
