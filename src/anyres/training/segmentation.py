"""Semantic segmentation: random crops, cross-entropy per pixel, mIoU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from anyres.data.schedule import Size
from anyres.data.segmentation import SegmentationSource, check_masks, open_segmentation
from anyres.data.segmentation_views import SegmentationViews
from anyres.evaluation.segmentation import evaluate_segmentation
from anyres.tasks.segmentation import Segmenter, segmentation_loss
from anyres.training.config import SegmentConfig
from anyres.training.dense import DenseTask
from anyres.training.losses import BaseLoss


class Segmentation(DenseTask):
    """A segmentation head on a backbone."""

    config: SegmentConfig
    score = "miou"
    network = Segmenter

    def open_source(self, split: str, like: SegmentationSource | None = None) -> SegmentationSource:
        config = self.config
        data, whole = (config.data, False) if like is None else self.validation_data()
        source = open_segmentation(
            data,
            split,
            num_classes=config.num_classes,
            reduce_zero_label=config.reduce_zero_label,
            mask_values=config.mask_values,
            in_chans=3 if like is None else like.in_chans,
            label_names=None if like is None else like.label_names,
            whole=whole,
        )
        if like is None:
            check_masks(source)
        return source

    def backbone_args(self) -> dict[str, Any]:
        return {"img_size": self.config.shapes[0]}  # tables of positions are kept at the size of the crops

    def views(self, source: SegmentationSource) -> SegmentationViews:
        config = self.config
        return SegmentationViews(
            source.mean,
            source.std,
            scale=(config.scale[0], config.scale[1]),
            longest=config.longest,
            largest_share=config.largest_share,
            hflip=config.hflip,
            jitter=config.photometric,
            separate=config.separate_aug,
        )

    def build_loss(self, source: SegmentationSource, accelerator: Accelerator) -> BaseLoss:
        def base_loss(outputs: dict[str, Tensor], labels: Tensor, view: Tensor) -> Tensor:
            return segmentation_loss(outputs, labels)

        return base_loss

    def facts(self, source: SegmentationSource) -> dict[str, Any]:
        # As the run was told, not as the data turned out: None leaves other data to their own layout, as in training.
        config = self.config
        told = {"reduce_zero_label": config.reduce_zero_label, "mask_values": config.mask_values}
        return {**super().facts(source), **told, "divisor": config.divisor}

    def evaluate(
        self, model: Any, source: SegmentationSource, size: Size, device: torch.device, precision: str
    ) -> dict[str, float]:
        config = self.config
        measure = partial(evaluate_segmentation, longest=config.longest, divisor=config.divisor)
        return measure(model, source, size, config.eval_batch_size, device, precision).scores
