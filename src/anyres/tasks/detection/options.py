"""Options of detection."""

from __future__ import annotations

from typing import Literal

from anyres.options import Sides, option
from anyres.tasks.options import DenseOptions, TestOptions


class DetectConfig(DenseOptions):
    """Options for training detection; the defaults are for Mask R-CNN on COCO, 12 epochs ("1x") with batch size 16."""

    head: Literal["retinanet", "faster_rcnn", "mask_rcnn", "keypoint_rcnn", "cascade_rcnn", "cascade_mask_rcnn"] = (
        option("mask_rcnn", "Detector on the backbone.")
    )
    model: str = option("resformer_small", "Backbone, a name from `anyres models`.")
    data: str = option("digits", "Training data: digits, or a folder in COCO's layout.")
    sizes: Sides = option([800], "Training sizes in pixels: short sides, or HEIGHTxWIDTH that images are fitted into.")
    distillation: Literal["none", "smooth-l1", "l2", "cosine", "kl"] = option(
        "none", "Scale consistency: the loss between each replica and the next larger one."
    )
    distillation_target: Literal["gap"] = option("gap", "Scale consistency: compare the mean of the last map.")
    epochs: int = option(12, "Passes over the training images.", ge=1)
    batch_size: int = option(
        16, "Images per optimiser step, summed over all processes and gradient accumulation steps.", ge=1
    )
    lr: float | None = option(1e-4, "Peak learning rate.", gt=0)
    decay: Literal["cosine", "linear", "poly", "step"] = option(
        "step", "Shape of the learning-rate decay. poly has power 0.9; step multiplies by 0.1 at each of `drops`."
    )
    drops: list[float] = option([8, 11], "With decay=step, the epochs after which the learning rate is divided by 10.")
    warmup_epochs: float = option(0.07, "Epochs of linear warm-up.", ge=0)
    warmup_lr: float = option(1e-7, "Learning rate at the start of warm-up (not scaled with the batch size).", ge=0)
    multi_scale: bool = option(False, "Random short sides and crops within each size, as in published 3x schedules.")
    jitter: list[float] = option([], "Large-scale jitter: range of the random scale, such as 0.1,2.0.")
    longest: float = option(
        1333 / 800, "Largest ratio of the long side to the short side; longer images are scaled down to it.", ge=1
    )
    keep_empty: bool = option(False, "Also train on images without objects.")
    eval_batch_size: int = option(1, "Validation batch size per process.", ge=1)

    @property
    def unused_parameters(self) -> bool:
        return True  # in a step without positive proposals, the mask head gets no gradient


class DetectionTest(TestOptions):
    """Options for evaluating detection."""

    of_results = ("threshold",)

    threshold: float = option(0.5, "Lowest score of the objects in a result.", ge=0, le=1)
    results: str | None = option(None, "Write all detections to this file in COCO's results format.")
    longest: float | None = option(
        None, "Largest ratio of the long side to the short side; by default as in training, or 1333/800.", ge=1
    )

    def check_outputs(self) -> None:
        if self.results is not None:
            from anyres.io.files import check_file

            check_file(self.results, "detections")
