"""`anyres segment test`, `anyres detect test` and `anyres video test`."""

from __future__ import annotations

from typing import Any, Literal

from anyres.cli.commands.values import check_device, read_numbers
from anyres.cli.terminal import (
    print_scores,
    print_table,
)
from anyres.errors import UserError


def segment_test(
    model: str,
    *,
    data: str = "digits",
    split: Literal["val", "train"] = "val",
    names: str | None = None,
    bit_depth: int | None = None,
    size: int = 512,
    scales: str = "1.0",
    flip: bool = False,
    window: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    workers: int = 0,
    classes: bool = True,
) -> None:
    """Measure the mIoU of a segmentation network: whole images or a sliding window, one scale or several.

    Args:
        model: a run or a saved model
        data: digits, a folder in ADE20K's layout, or hf:NAME
        split: part of the data
        names: file of the model's class names, one on a line, instead of those that it comes with
        bit_depth: bits of pictures of more than 8 bits, where the files do not say: 12, or 16 for dark ones
        size: short side of the images; the long side is at most four times as long
        scales: factors at which every image is seen, such as 0.5,0.75,1,1.25,1.5,1.75
        flip: see every image mirrored, too
        window: side of a sliding window, instead of whole images
        batch_size: images of one size per pass
        device: auto, cpu, cuda, …
        precision: of the arithmetic, under autocast
        workers: processes that decode images
        classes: print the IoU of every class, too
    """
    from anyres.evaluation.segmentation import evaluate_segmentation
    from anyres.inference.preparation import fitting_of

    place, network, source = _open_for_test("segmentation", model, data, split, device, names, bit_depth)
    measured = evaluate_segmentation(
        network,
        source,
        (size, size),
        batch_size,
        place,
        precision,
        workers=workers,
        scales=read_numbers("scales", scales),
        flip=flip,
        window=window,
        **fitting_of(network),
    )
    if classes:
        rows = [[name, "–" if value is None else f"{value:.1f}"] for name, value in measured.iou.items()]
        print_table(["class", "IoU (%)"], rows)
    print_scores(measured)


def detect_test(
    model: str,
    *,
    data: str = "digits",
    split: Literal["val", "train"] = "val",
    names: str | None = None,
    bit_depth: int | None = None,
    size: int = 800,
    results: str | None = None,
    batch_size: int = 1,
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    workers: int = 0,
) -> None:
    """Measure the AP of a detector as COCO does: boxes, and masks or keypoints where it gives them.

    Args:
        model: a run or a saved model
        data: digits, or a folder in COCO's layout
        split: part of the data
        names: file of the model's class names, one on a line, instead of those that it comes with
        bit_depth: bits of pictures of more than 8 bits, where the files do not say: 12, or 16 for dark ones
        size: short side of the images; the long side is at most 1333/800 of that
        results: a file for all detections, in COCO's layout
        batch_size: images per pass; they are padded to one size
        device: auto, cpu, cuda, …
        precision: of the arithmetic, under autocast
        workers: processes that decode images
    """
    from anyres.evaluation.detection import evaluate_detection
    from anyres.inference.preparation import fitting_of
    from anyres.io.files import check_file

    if results is not None:
        check_file(results, "detections")
    place, network, source = _open_for_test("detection", model, data, split, device, names, bit_depth)
    measured = evaluate_detection(
        network,
        source,
        (size, size),
        batch_size,
        place,
        precision,
        workers=workers,
        results=results,
        **fitting_of(network),
    )
    print_scores(measured)


def video_test(
    model: str,
    *,
    data: str = "digits",
    split: Literal["val", "train"] = "val",
    names: str | None = None,
    size: int = 224,
    clips: int = 1,
    crops: int = 1,
    crop_pct: float | None = None,
    batch_size: int = 8,
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    workers: int = 0,
) -> None:
    """Measure the accuracy of a video network over one or several views of each clip.

    Args:
        model: a run or a saved model
        data: digits, or a folder in Kinetics' layout
        split: part of the data
        names: file of the model's class names, one on a line, instead of those that it comes with
        size: side of the views
        clips: clips of each video, evenly spread
        crops: 1 (centre) or 3 (along the long side) of each clip
        crop_pct: centre crop / resized short side; otherwise the model's, and 1 with three crops
        batch_size: videos per pass
        device: auto, cpu, cuda, …
        precision: of the arithmetic, under autocast
        workers: processes that decode videos
    """
    from anyres.evaluation.video import evaluate_video

    place, network, source = _open_for_test("video", model, data, split, device, names)
    measured = evaluate_video(
        network,
        source,
        (size, size),
        batch_size,
        place,
        precision,
        workers=workers,
        clips=clips,
        crops=crops,
        crop_pct=crop_pct,
    )
    print_scores(measured)


def _open_for_test(
    task: str, model: str, data: str, split: str, device: str, names: str | None, bit_depth: int | None = None
) -> tuple[str, Any, Any]:
    """(device, network, data), after making sure that the network is for the task."""
    from anyres.evaluation.measure import open_test_source
    from anyres.inference.modelspec import open_model
    from anyres.tasks import task_of

    place = check_device(device)
    network: Any = open_model(model, names)[1]
    if task_of(network) != task:
        raise UserError(f"{model} is a model for {task_of(network)}, not for {task}; use the command of its task.")
    return place, network, open_test_source(network, data, split, bit_depth=bit_depth)
