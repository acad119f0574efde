"""The evaluation that belongs to a model: which data, which score, which pictures, whatever its task."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from anyres.data import BadImage, open_source, rle
from anyres.data.classes import tell_subset
from anyres.evaluation.accuracy import evaluate, first_images
from anyres.evaluation.results import Measured, Size
from anyres.inference.preparation import fitting_of, label_names, label_places, preparation_for, tell_borrowed
from anyres.tasks import task_of

if TYPE_CHECKING:
    from PIL import Image


def open_test_source(
    model: Any, data: str, split: str = "val", *, others: Sequence[Any] = (), bit_depth: int | None = None
) -> Any:
    """The data of a model's task, with the masks and keypoints that it, or one of the `others` that share the data, is
    judged by; `bit_depth` is that of its pictures, where it has to be told. Raises UserError where the classes do not
    fit one of the models."""
    source = _open_source(model, data, split, others)
    source.bit_depth = bit_depth
    for each in (model, *others):
        places, known = label_places(each, source).tolist(), label_names(each)
        tell_subset(known, places, knower=type(each).__name__, namer=source.name)
        tell_borrowed(each, source)
    return source


def _open_source(model: Any, data: str, split: str, others: Sequence[Any]) -> Any:
    task = task_of(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if task == "segmentation":
        from anyres.data.segmentation import class_names, open_segmentation

        return open_segmentation(
            data,
            split,
            num_classes=None if class_names(Path(data)) else model.num_classes,
            reduce_zero_label=cfg.get("reduce_zero_label"),
            mask_values=cfg.get("mask_values") or (),
        )
    if task == "detection":
        from anyres.data.detection import open_detection

        rle.coco_masks()  # it complains now, not after the last picture
        heads = " ".join(each.options["head"] for each in (model, *others))
        return open_detection(data, split, masks="mask" in heads, keypoints="keypoint" in heads)
    if task == "video":
        from anyres.data.video_sources import open_video_source

        return open_video_source(data, split)
    return open_source(data, split)


def measure(
    model: nn.Module,
    source: Any,
    size: Size,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    *,
    workers: int = 0,
) -> Measured:
    """Scores of a model on its task's data at `size`; see the evaluation of each task."""
    task = task_of(model)
    run: Callable[..., Measured] = evaluate
    if task != "classification":
        # Imported here: they may need packages that are not installed.
        module = importlib.import_module(f"anyres.evaluation.{task}")
        run = getattr(module, f"evaluate_{task}")
    return run(model, source, size, batch_size, device, precision, workers=workers, **fitting_of(model))


def matching(model: nn.Module, source: Any) -> str:
    """Changes when what the source marks means something else to the model: the classes, their places among its
    outputs, the values of masks, or how pictures are read and fitted."""
    values = np.ravel(getattr(source, "table", ())).tolist()
    places = label_places(model, source).tolist()
    said = [label_names(model), source.label_names, places, values, source.bit_depth, fitting_of(model)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def preparation_text(model: nn.Module, source: Any) -> str:
    """How the evaluation prepares images, in a sentence."""
    way = preparation_for(model, source)
    if task_of(model) in ("segmentation", "detection"):
        divisor = fitting_of(model).get("divisor", 1)
        rounded = f", both sides up to multiples of {divisor}" if divisor > 1 else ""
        return f"resized with their ratio kept, the short side to the size{rounded}; {way.normalisation}."
    return str(way)


def sample_images(model: nn.Module, source: Any, size: Size, count: int) -> list[Image.Image]:
    """The first `count` readable images as the model sees them at `size`, in their own colours; the middle frames of
    clips."""
    task = task_of(model)
    if task == "classification":
        return first_images(model, source, size, count)
    from PIL import Image

    way = preparation_for(model, source)
    test: Any
    if task == "segmentation":
        from anyres.data.segmentation_views import SegmentationTest

        test = SegmentationTest(size, way.mean, way.std, **fitting_of(model))
    elif task == "detection":
        from anyres.data.detection_views import DetectionTest

        test = DetectionTest(size, way.mean, way.std, **fitting_of(model))
    else:
        from anyres.data.video_views import ClipTest
        from anyres.inference.preparation import sampling_of

        sampling = sampling_of(model)
        test = ClipTest(size, sampling, way.mean, way.std, crop_pct=way.crop_pct, interpolation=way.interpolation)
    images: list[Image.Image] = []
    for index in range(len(source)):
        if len(images) == count:
            break
        try:
            images.append(Image.fromarray(_picture(test.prepare(source.item(index)))))
        except BadImage:
            continue
    return images


def _picture(sample: Any) -> np.ndarray:
    """The pixels (h, w[, 3]) in what a task's `prepare` returns."""
    if hasattr(sample, "pixels"):  # clips (views, T, h, w[, 3])
        frames: np.ndarray = sample.pixels[0]
        return frames[len(frames) // 2]
    picture: np.ndarray = sample[0] if isinstance(sample, tuple) else sample
    return picture
