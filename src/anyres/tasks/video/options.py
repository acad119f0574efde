"""Options of action recognition."""

from __future__ import annotations

from typing import Literal

from anyres.options import option
from anyres.tasks.options import LabelOptions, TestOptions


class VideoConfig(LabelOptions):
    """Options of a video run; defaults are those of ResFormer in TimeSformer where the paper has any."""

    model: str = option("resformer_base", "A plain backbone (divided space-time attention) or a video network.")
    data: str = option("digits", "Training data: digits, or a folder in Kinetics' layout (CLASS folders or CSV).")
    frames: int = option(8, "Frames of a clip.", ge=1)
    stride: float = option(32.0, "Source frames (at 30 a second) from one frame of a clip to the next.", gt=0)
    epochs: int = option(15, "Passes over the training clips.", ge=1)
    batch_size: int = option(64, "Clips per optimiser step, over all processes and accumulated passes together.", ge=1)
    optimizer: str = option("sgd", "Optimiser, a name of timm.optim.")
    lr: float | None = option(5e-3, "Peak learning rate.", gt=0)
    weight_decay: float = option(1e-4, "Weight decay; not for biases, norms and the model's no_weight_decay().", ge=0)
    decay: Literal["cosine", "linear", "poly", "step"] = option(
        "step", "How the learning rate falls; poly has the power 0.9, step is 0.1 at each of `drops`."
    )
    drops: list[float] = option([11, 14], "decay=step: epochs after which the learning rate is a tenth.")
    warmup_epochs: float = option(0.0, "Epochs of linear warm-up.", ge=0)
    interpolation: str = option("bilinear", "Interpolation of resizes, in training and validation.")
    mixup: float = option(0.0, "Mixup alpha; 0 switches it off.", ge=0)
    cutmix: float = option(0.0, "CutMix alpha; 0 switches it off.", ge=0)
    smoothing: float = option(0.0, "Label smoothing.", ge=0, lt=1)
    auto_augment: str | None = option(None, "timm's RandAugment/AutoAugment policy, the same for all frames.")
    erasing: float = option(0.0, "Probability of random erasing.", ge=0, le=1)
    crop_pct: float = option(1.0, "Validation: centre crop / resized short side (MViTv2: 0.875).", gt=0, le=1)
    eval_batch_size: int = option(16, "Clips per process and pass in validation.", ge=1)


class VideoTest(TestOptions):
    """Options of a test of videos; see `ClipTest` and `Sampling`."""

    of_results = ("topk",)

    clips: int = option(1, "Clips of each video, evenly spread.", ge=1)
    crops: int = option(1, "1 (centre) or 3 (along the long side) of each clip.")
    frames: int | None = option(None, "Frames of a clip; otherwise as trained.", ge=1)
    stride: float | None = option(
        None, "Source frames (at 30 a second) between two of them; otherwise as trained.", gt=0
    )
    segments: bool = option(False, "One frame of each of as many equal parts of the video (Something-Something v2).")
    crop_pct: float | None = option(
        None, "Centre crop / resized short side; otherwise the model's, and 1 with three crops.", gt=0, le=1
    )
    topk: int = option(5, "Classes that a result names.", ge=1)
