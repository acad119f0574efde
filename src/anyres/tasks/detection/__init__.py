"""Object detection: boxes, masks or keypoints, the losses of the heads, COCO's AP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anyres.shapes import Size
from anyres.tasks.base import Demo
from anyres.tasks.dense import DenseTask
from anyres.tasks.detection.options import DetectConfig, DetectionTest

if TYPE_CHECKING:
    import torch

    from anyres.data import detection_views
    from anyres.data.config import DataConfig
    from anyres.data.detection import DetectionSource
    from anyres.data.fitting import OwnSize
    from anyres.data.samples import EvalBatch
    from anyres.tasks.detection.network import Detector, Found
    from anyres.tasks.detection.score import AveragePrecision
    from anyres.tasks.objective import Objective
    from anyres.tasks.results import Detections


class Detection(DenseTask):
    """Object detection, instance segmentation and keypoint detection."""

    name = "detection"
    group = "detect"
    pipeline = "object-detection"
    packages = ("faster_coco_eval",)
    about_training = "Train a detector on any backbone, at one or several resolutions, or continue a run."
    about_test = "Measure the COCO AP of a detector for boxes, and for masks or keypoints if it predicts them."
    options = DetectConfig
    test_options = DetectionTest
    test_size = 800
    demo = Demo(
        "Train a detector at three sizes and one at a single size on composed scenes, and compare them at many sizes.",
        {"CMT, three sizes": "digits", "CMT, one size": "digits_single"},
        tuple((side, side) for side in (32, 48, 64, 80, 96, 128, 160, 192)),
    )
    score = "ap"
    measure = "box AP"
    titles = {"ap": ("Box AP", "box AP")}  # noqa: RUF012  # typed in the base
    part_titles = {  # noqa: RUF012
        "ap_small": "AP of small objects",
        "ap_medium": "AP of medium objects",
        "ap_large": "AP of large objects",
    }
    second_titles = {"ap50": "AP50"}  # noqa: RUF012
    columns = {"class": str, "score": float, **dict.fromkeys(("left", "top", "right", "bottom"), float)}  # noqa: RUF012

    @property
    def network(self) -> type[Detector]:
        from anyres.tasks.detection.network import Detector

        return Detector

    def open_source(self, options: DetectConfig, split: str, like: DetectionSource | None = None) -> DetectionSource:
        from anyres.data import rle
        from anyres.data.detection import open_detection

        rle.coco_masks()  # needed in validation; report a missing package now rather than after the first epoch
        return open_detection(
            options.data if like is None else options.validation_data[0],
            split,
            masks="mask" in options.head,
            keypoints="keypoint" in options.head,
            keep_empty=options.keep_empty,
            in_chans=None if like is None else like.in_chans,
            label_names=None if like is None else like.label_names,
        )

    def open_test_source(self, data: str, split: str, models: Sequence[Detector]) -> DetectionSource:
        from anyres.data import rle
        from anyres.data.detection import open_detection

        rle.coco_masks()  # report a missing package now rather than after the last image
        heads = " ".join(model.options["head"] for model in models)
        return open_detection(data, split, masks="mask" in heads, keypoints="keypoint" in heads)

    def head_args(self, source: DetectionSource) -> dict[str, Any]:
        return {"num_keypoints": len(source.keypoint_names)} if source.keypoint_names else {}

    def views(self, options: DetectConfig, source: DetectionSource) -> detection_views.DetectionViews:
        from anyres.data.detection_views import DetectionViews

        return options.build(DetectionViews, mean=source.mean, std=source.std, flip_pairs=source.flip_pairs)

    def objective(self, options: DetectConfig, source: DetectionSource, accelerator: Any) -> Objective:
        from anyres.tasks.detection.network import DetectionObjective

        return DetectionObjective()

    def transform(
        self, config: DataConfig, size: Size | OwnSize, options: DetectionTest
    ) -> detection_views.DetectionTest:
        from anyres.data.detection_views import LONGEST, DetectionTest

        longest = options.longest or config.fitting.get("longest", LONGEST)
        return DetectionTest(size, config.mean, config.std, longest)

    def forward(self, model: Any, batch: EvalBatch, device: torch.device, options: DetectionTest) -> Found:
        from anyres.tasks.detection.network import Found
        from anyres.tasks.finite import layers_watched

        with layers_watched(getattr(model, "head", model)) as finite:
            objects = model(batch.inputs.images.to(device, non_blocking=True), batch.inputs.sizes)
        return Found(objects, batch.inputs.sizes, finite)

    def results(
        self, config: DataConfig, outputs: Found, batch: EvalBatch, options: DetectionTest
    ) -> Sequence[Detections]:
        from anyres.tasks.detection.network import at_full_size
        from anyres.tasks.finite import check_found
        from anyres.tasks.results import Detections

        check_found(config.model, outputs.objects, outputs.finite, ", ".join(batch.names))
        results = []
        for name, objects, seen, full in zip(batch.names, outputs.objects, outputs.seen, batch.full, strict=True):
            kept = objects["scores"] >= options.threshold
            found = at_full_size({name: values[kept] for name, values in objects.items()}, seen, full)
            arrays = {name: values.cpu().numpy() for name, values in found.items()}
            labels, scores = arrays["labels"].tolist(), arrays["scores"].tolist()
            results.append(
                Detections(
                    name,
                    arrays["boxes"],
                    labels,
                    scores,
                    config.label_names,
                    arrays.get("masks"),
                    arrays.get("keypoints"),
                )
            )
        return results

    def metric(self, config: DataConfig, source: Any, options: DetectionTest) -> AveragePrecision:
        from anyres.tasks.detection.score import AveragePrecision

        return AveragePrecision(config, source, options.results)


TASK = Detection()
