"""Detection: boxes, masks or keypoints of objects, the heads' own losses, COCO's AP."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from anyres.data import rle
from anyres.data.detection import DetectionSource, open_detection
from anyres.data.detection_views import DetectionView, DetectionViews
from anyres.data.schedule import Size
from anyres.evaluation.detection import evaluate_detection
from anyres.tasks.detection import Detector
from anyres.training.config import DetectConfig
from anyres.training.dense import DenseTask
from anyres.training.losses import BaseLoss


class Detection(DenseTask):
    """A detector on a backbone."""

    config: DetectConfig
    score = "ap"
    network = Detector

    def open_source(self, split: str, like: DetectionSource | None = None) -> DetectionSource:
        config = self.config
        rle.coco_masks()  # validation needs it: it complains now, not after the first epoch
        return open_detection(
            config.data if like is None else self.validation_data()[0],
            split,
            masks="mask" in config.head,
            keypoints="keypoint" in config.head,
            keep_empty=config.keep_empty,
            in_chans=None if like is None else like.in_chans,
            label_names=None if like is None else like.label_names,
        )

    def head_args(self, source: DetectionSource) -> dict[str, Any]:
        return {"num_keypoints": len(source.keypoint_names)} if source.keypoint_names else {}

    def views(self, source: DetectionSource) -> DetectionViews:
        config = self.config
        return DetectionViews(
            source.mean,
            source.std,
            flip_pairs=source.flip_pairs,
            longest=config.longest,
            hflip=config.hflip,
            multi_scale=config.multi_scale,
            jitter=tuple(config.jitter) if config.jitter else None,  # type: ignore[arg-type]  # the views check it
        )

    def build_loss(self, source: DetectionSource, accelerator: Accelerator) -> BaseLoss:
        def base_loss(outputs: dict[str, Tensor], objects: Any, view: DetectionView) -> Tensor:
            return torch.stack([loss for name, loss in outputs.items() if name != "gap"]).sum()

        return base_loss

    def evaluate(
        self, model: Any, source: DetectionSource, size: Size, device: torch.device, precision: str
    ) -> dict[str, float]:
        config = self.config
        return evaluate_detection(
            model, source, size, config.eval_batch_size, device, precision, longest=config.longest
        ).scores
