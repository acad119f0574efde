"""Evaluate a model on the data of its task at one size."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from anyres.data import BadImage, EvalLoader
from anyres.data.config import DataConfig
from anyres.data.kept import KeptImages
from anyres.data.samples import pixels_of
from anyres.errors import UserError
from anyres.inference.predictor import Predictor
from anyres.shapes import Size
from anyres.tasks import task_of
from anyres.tasks.scores import Measured


def open_test_source(
    model: Any, data: str, split: str = "val", *, others: Sequence[Any] = (), bit_depth: int | None = None
) -> Any:
    """Open the test data of a model's task, including the masks and keypoints that its scores need.

    Args:
        others: further models that will be evaluated on the same data; the scores that they need are included.
        bit_depth: bits per channel of the images, if it cannot be read from the files.

    Raises:
        UserError: if the classes of the data do not fit one of the models.
    """
    from anyres.data.classes import tell_subset

    source = task_of(model).open_test_source(data, split, [model, *others])
    source.bit_depth = bit_depth
    for each in (model, *others):
        config = DataConfig.of(each, source)
        tell_subset(config.label_names, config.places(source).tolist(), knower=config.model, namer=source.name)
        config.tell_borrowed()
    return source


def evaluate(
    model: nn.Module,
    source: Any,
    size: Size,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    *,
    workers: int = 0,
    indices: Sequence[int] | None = None,
    kept: KeptImages | None = None,
    **options: Any,
) -> Measured:
    """Return the scores of a model on every item of `source` at `size` (height, width).

    Items are prepared according to the model's data config (`data.config.DataConfig`), or to the source where the
    model specifies nothing. Under torch.distributed each process evaluates its share of the items, each item counts
    once, and every process returns the scores over all items. The model is moved to `device`, and its train/eval mode
    is restored afterwards.

    Args:
        batch_size: items per batch; by default that of the task.
        precision: "bfloat16" and "float16" run under autocast.
        indices: those of the items to evaluate (`data.kept.spread`), of a source that has indices; all by default.
        kept: decoded images of earlier evaluations on the same source, used and added to if there are no `workers`.
        options: options of the task, see `Task.test_options`.

    Returns:
        The scores defined in the task's `score` module: "top1", "top5" and "loss" for image and video classification,
        "miou", "pixel_accuracy" and "mean_accuracy" for segmentation, COCO's "ap" and so on for detection.

    Raises:
        UserError: if no item is readable, the classes do not fit the model, weights or outputs are not finite, or the
            size is below the model's minimum.
    """
    predictor = Predictor(model, size, device=device, precision=precision, source=source, **options)
    task, (rank, world) = predictor.task, process()
    metric = task.metric(predictor.config, source, predictor.options)
    loader = EvalLoader(
        source,
        predictor.transform,
        batch_size or task.test_batch_size,
        workers,
        rank=rank,
        world=world,
        indices=indices,
        kept=kept,
    )
    count = 0
    with predictor.running():
        for batch in loader:
            metric.update(predictor.forward(batch), batch)
            count += len(batch.names)
    shares = gather((metric.share(), count, [str(image) for image in loader.bad]))
    count, bad = sum(share[1] for share in shares), [name for share in shares for name in share[2]]
    if not count:
        raise UserError(f"{source.name} has no readable image ({len(bad)} skipped): check the files")
    measured: Measured | UserError | None = None
    if rank == 0:
        try:
            measured = metric.compute([share[0] for share in shares], count)
        except UserError as error:  # raised below on all processes
            measured = error
    measured = gather(measured)[0]
    if isinstance(measured, UserError):
        raise measured
    assert measured is not None
    return dataclasses.replace(measured, bad_images=tuple(bad))


def process() -> tuple[int, int]:
    """Return (rank, world size) of torch.distributed, or (0, 1) without it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(share: Any) -> list[Any]:
    """Gather the `share` of every process, in order of rank."""
    world = process()[1]
    if world == 1:
        return [share]
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, share)
    return shares


def matching(model: nn.Module, source: Any) -> str:
    """Return a hash of how a model interprets the source.

    It changes with the classes, their indices in the model's output, the values of masks, the bit depth and the way
    images are resized.
    """
    config = DataConfig.of(model, source)
    values = np.ravel(getattr(source, "table", ())).tolist()
    places = config.places(source).tolist()
    said = [config.label_names, source.label_names, places, values, source.bit_depth, config.fitting]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def preparation_text(model: nn.Module, source: Any) -> str:
    """Describe the eval transform in a sentence for the report."""
    config = DataConfig.of(model, source)
    if task_of(model).keeps_ratio:
        divisor = config.fitting.get("divisor", 1)
        rounded = f", both sides up to multiples of {divisor}" if divisor > 1 else ""
        return f"resized at their aspect ratio, the short side to the size{rounded}; {config.normalisation}."
    share = f"{config.crop_pct:.4g}"
    return (
        f"{config.interpolation} resize of the short side to int(size/{share}), centre crop to size; non-square sizes:"
        " resized to cover (height, width) divided by the same number, then the centre crop;"
        f" {config.normalisation}."
    )


def sample_images(
    model: nn.Module, source: Any, size: Size, count: int, indices: Sequence[int] | None = None
) -> list[Image.Image]:
    """Return the first `count` readable images as the model sees them at `size`, but in their original colours.

    For clips, these are the middle frames. `indices` are those of the items to choose from.
    """
    task = task_of(model)
    transform = task.transform(DataConfig.of(model, source), size, task.test_options())
    images: list[Image.Image] = []
    chosen = range(len(source)) if indices is None and hasattr(source, "item") else indices
    for item in source.items(None) if chosen is None else map(source.item, chosen):
        if len(images) == count:
            break
        try:
            images.append(Image.fromarray(pixels_of(transform.prepare(item))).convert("RGB"))
        except BadImage:
            continue
    return images
