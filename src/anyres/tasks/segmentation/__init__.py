"""Semantic segmentation: random crops, per-pixel cross-entropy, mIoU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyres.shapes import Size
from anyres.tasks.base import Demo
from anyres.tasks.dense import DenseTask
from anyres.tasks.segmentation.options import SegmentationTest, SegmentConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from anyres.data import segmentation_views
    from anyres.data.config import DataConfig
    from anyres.data.fitting import OwnSize
    from anyres.data.samples import EvalBatch
    from anyres.data.segmentation import SegmentationSource
    from anyres.tasks.objective import Objective
    from anyres.tasks.results import Segments
    from anyres.tasks.segmentation.network import Segmenter
    from anyres.tasks.segmentation.score import MeanIoU


class Segmentation(DenseTask):
    """Semantic segmentation."""

    name = "segmentation"
    group = "segment"
    pipeline = "image-segmentation"
    about_training = "Train a segmentation network on any backbone, at one or several resolutions, or continue a run."
    about_test = "Measure the mIoU of a segmentation network, on whole images or tiles, at one or several scales."
    options = SegmentConfig
    test_options = SegmentationTest
    test_size = 512
    demo = Demo(
        "Train a multi-resolution ResFormer and an ordinary DeiT to segment composed scenes, and compare them at many"
        " sizes.",
        {"ResFormer": "digits", "DeiT": "digits_deit"},
        tuple((side, side) for side in (24, 32, 40, 48, 60, 72, 96, 128, 160)),
    )
    score = "miou"
    measure = "mIoU"
    class_score = "IoU"
    titles = {"miou": ("mIoU", "mIoU")}  # noqa: RUF012  # typed in the base
    second_titles = {"pixel_accuracy": "pixel accuracy"}  # noqa: RUF012
    columns = {"class": str, "share of pixels": float}  # noqa: RUF012

    @property
    def network(self) -> type[Segmenter]:
        from anyres.tasks.segmentation.network import Segmenter

        return Segmenter

    def open_source(
        self, options: SegmentConfig, split: str, like: SegmentationSource | None = None
    ) -> SegmentationSource:
        from anyres.data.segmentation import check_masks, open_segmentation

        data, whole = (options.data, False) if like is None else options.validation_data
        source = open_segmentation(
            data,
            split,
            num_classes=options.num_classes,
            reduce_zero_label=options.reduce_zero_label,
            mask_values=options.mask_values,
            in_chans=3 if like is None else like.in_chans,
            label_names=None if like is None else like.label_names,
            whole=whole,
        )
        if like is None:
            check_masks(source)
        return source

    def open_test_source(self, data: str, split: str, models: Sequence[Segmenter]) -> SegmentationSource:
        from anyres.data.config import DataConfig
        from anyres.data.segmentation import class_names, open_segmentation

        classes = None if class_names(Path(data)) else models[0].num_classes
        return open_segmentation(data, split, num_classes=classes, **DataConfig.of(models[0]).masks)

    def backbone_args(self, options: SegmentConfig) -> dict[str, Any]:
        return {"img_size": options.shapes[0]}  # size of the position tables

    def views(self, options: SegmentConfig, source: SegmentationSource) -> segmentation_views.SegmentationViews:
        from anyres.data.segmentation_views import SegmentationViews

        return options.build(SegmentationViews, mean=source.mean, std=source.std)

    def objective(self, options: SegmentConfig, source: SegmentationSource, accelerator: Any) -> Objective:
        from anyres.tasks.segmentation.network import SegmentationObjective

        return SegmentationObjective()

    def facts(self, options: Any, source: SegmentationSource) -> dict[str, Any]:
        # Save the options, not what was found in the data: None means that other data use their own layout.
        told = {"reduce_zero_label": options.reduce_zero_label, "mask_values": options.mask_values}
        return {**super().facts(options, source), **told, "divisor": options.divisor}

    def transform(
        self, config: DataConfig, size: Size | OwnSize, options: SegmentationTest
    ) -> segmentation_views.SegmentationTest:
        from anyres.data.segmentation_views import SegmentationTest

        told = {name: value for name in ("longest", "divisor") if (value := getattr(options, name)) is not None}
        return SegmentationTest(size, config.mean, config.std, **{**config.fitting, **told})

    def forward(self, model: Any, batch: EvalBatch, device: torch.device, options: SegmentationTest) -> Tensor:
        from anyres.tasks.segmentation.network import predict_probabilities

        images = batch.inputs.to(device, non_blocking=True)
        return predict_probabilities(model, images, batch.full[0], options.scales, options.flip, options.window)

    def results(
        self, config: DataConfig, outputs: Tensor, batch: EvalBatch, options: SegmentationTest
    ) -> Sequence[Segments]:
        from anyres.tasks.results import Segments
        from anyres.tasks.segmentation.score import check_probabilities

        check_probabilities(config.model, outputs, batch.names)
        classes = outputs.argmax(1).cpu().numpy()
        return [Segments(name, each, config.label_names) for name, each in zip(batch.names, classes, strict=True)]

    def metric(self, config: DataConfig, source: Any, options: SegmentationTest) -> MeanIoU:
        from anyres.tasks.segmentation.score import MeanIoU

        return MeanIoU(config, source)


TASK = Segmentation()
