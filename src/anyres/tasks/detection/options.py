"""Options of detection."""

from __future__ import annotations

from typing import Literal

from anyres.options import Sides, option
from anyres.tasks.options import DenseOptions, TestOptions


class DetectConfig(DenseOptions):
    """Options of a detection run; defaults are those of Mask R-CNN on COCO in 12 epochs ("1x") of 16 images."""

    head: Literal["retinanet", "faster_rcnn", "mask_rcnn", "keypoint_rcnn", "cascade_rcnn", "cascade_mask_rcnn"] = (
        option("mask_rcnn", "Detector on the backbone.")
    )
    model: str = option("resformer_small", "Backbone, a name from `anyres models`.")
    data: str = option("digits", "Training data: digits, or a folder in COCO's layout.")
    sizes: Sides = option([800], "Training sizes in pixels: short sides, or boxes HEIGHTxWIDTH.")
    distillation: Literal["none", "smooth-l1", "l2", "cosine", "kl"] = option(
        "none", "Scale consistency: how a replica is compared with the next larger one."
    )
    distillation_target: Literal["gap"] = option("gap", "Scale consistency compares the mean of the last map.")
    epochs: int = option(12, "Passes over the training images.", ge=1)
    batch_size: int = option(16, "Images per optimiser step, over all processes and accumulated passes together.", ge=1)
    lr: float | None = option(1e-4, "Peak learning rate.", gt=0)
    decay: Literal["cosine", "linear", "poly", "step"] = option(
        "step", "How the learning rate falls; poly has the power 0.9, step is 0.1 at each of `drops`."
    )
    drops: list[float] = option([8, 11], "decay=step: epochs after which the learning rate is a tenth.")
    warmup_epochs: float = option(0.07, "Epochs of linear warm-up.", ge=0)
    warmup_lr: float = option(1e-7, "Learning rate at the start of the warm-up (not scaled).", ge=0)
    multi_scale: bool = option(False, "Random short sides and crops (the 3x schedules' recipe), within each size.")
    jitter: list[float] = option([], "Large-scale jitter: range of the random scale, such as 0.1,2.0.")
    longest: float = option(
        1333 / 800, "Largest ratio of the long side to the short one; longer images get smaller.", ge=1
    )
    keep_empty: bool = option(False, "Train on images without objects, too.")
    eval_batch_size: int = option(1, "Images per process and pass in validation.", ge=1)

    @property
    def unused_parameters(self) -> bool:
        return True  # a step without a positive proposal leaves the mask head alone


class DetectionTest(TestOptions):
    """Options of a test of detection."""

    of_results = ("threshold",)

    threshold: float = option(0.5, "Smallest score of the objects that a result holds.", ge=0, le=1)
    results: str | None = option(None, "A file for all detections, in COCO's layout.")
    longest: float | None = option(
        None, "Largest ratio of the long side to the short one; otherwise as trained, or 1333/800.", ge=1
    )

    def check_outputs(self) -> None:
        if self.results is not None:
            from anyres.io.files import check_file

            check_file(self.results, "detections")
