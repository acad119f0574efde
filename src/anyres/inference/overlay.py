"""Predictions of segmentation, detection and video models, drawn on the images and frames they are of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from anyres.data import BadImage, Item, load_image, normalize, to_batch
from anyres.data.fitting import fit
from anyres.data.schedule import Size
from anyres.errors import UserError
from anyres.inference.finite import check_found, check_outputs, check_weights, layers_watched
from anyres.inference.preparation import (
    Preparation,
    check_size,
    fitting_of,
    label_names,
    preparation_for,
    tell_borrowed,
)
from anyres.io.files import atomic_write, check_files
from anyres.tasks import task_of
from anyres.tasks.drawing import draw_clip, draw_detections, draw_segmentation


class Overlay(NamedTuple):
    """What was found in an image or clip, as cells of text, and the picture of it; or why nothing was."""

    name: str
    cells: list[list[str]]
    picture: Path | None = None
    problem: str = ""


COLUMNS = {
    "segmentation": ["class", "share of pixels"],
    "detection": ["class", "score", "left", "top", "right", "bottom"],
    "video": ["class", "probability"],
}
"""What `Overlay.cells` hold, by task."""


def picture_names(names: Iterable[str]) -> list[str]:
    """What the pictures of items of these names are called: the stem and .png, with a number where it is taken."""
    taken: dict[str, None] = {}
    for stem in (Path(name).stem for name in names):
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken[name] = None
    return [f"{name}.png" for name in taken]


def check_folder(folder: Path, files: Sequence[Path]) -> None:
    """Raises UserError where the pictures of the `files` would take the place of what anyres did not write in the
    `folder`, and where one of the `files` lies in it."""
    check_files(folder, "picture", picture_names(map(str, files)))
    home = folder.resolve()
    inside = next((file for file in files if home in (file.parent.resolve(), file.resolve().parent)), None)
    if inside is not None:
        raise UserError(f"{folder} is the folder of {inside}: choose another one for the pictures, to keep your own.")


def overlays(
    model: nn.Module,
    items: Sequence[Item],
    folder: Path,
    size: Size,
    *,
    topk: int = 5,
    threshold: float = 0.5,
    device: str | torch.device = "cpu",
) -> Iterator[Overlay]:
    """Predict item after item at `size` (their labels are not looked at) and write a PNG of each into `folder`.

    `topk` classes of clips are named, and detections with a score of at least `threshold`. An item that cannot be read
    gives an `Overlay` with its `problem`. Raises UserError for a size below the model's minimum, and for weights or
    outputs that are not finite. See `check_folder`.
    """
    check_size(model, size)
    check_weights(model)
    tell_borrowed(model)
    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(device).eval()
    draw = {"segmentation": _segment, "detection": _detect, "video": _recognise}[task_of(model)]
    for item, name in zip(items, picture_names(item.name for item in items), strict=True):
        try:
            cells, picture = draw(model, item, size, topk, threshold, torch.device(device))
        except BadImage as bad:
            yield Overlay(item.name, [], problem=bad.reason)
            continue
        target = folder / name
        with atomic_write(target, "picture") as temporary:
            picture.save(temporary, format="PNG")
        yield Overlay(item.name, cells, target)


def _open(model: Any, item: Item, size: Size) -> tuple[Image.Image, np.ndarray, Preparation]:
    """The image, and at the size that the model sees it at: uint8 (h, w) or (h, w, 3)."""
    way = preparation_for(model)
    image = load_image(item.data, item.name, way.in_chans)
    height, width = fit(image.height, image.width, size, **fitting_of(model))
    view = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return image, np.asarray(view), way


@torch.inference_mode()
def _segment(
    model: Any, item: Item, size: Size, topk: int, threshold: float, device: torch.device
) -> tuple[list[list[str]], Image.Image]:
    from anyres.tasks.segmentation import predict_probabilities

    image, view, way = _open(model, item, size)
    x = normalize(to_batch([view]), way.mean, way.std)
    probabilities = predict_probabilities(model, x.to(device), (image.height, image.width))
    check_outputs(model, not probabilities[:, 0].isnan().any(), item.name)
    classes = probabilities.argmax(1)[0].cpu().numpy()
    names = label_names(model)
    present, counts = np.unique(classes, return_counts=True)
    order = np.argsort(-counts)
    cells = [[names[present[i]], f"{100 * counts[i] / classes.size:.1f} %"] for i in order]
    return cells, draw_segmentation(image, classes, names)


@torch.inference_mode()
def _detect(
    model: Any, item: Item, size: Size, topk: int, threshold: float, device: torch.device
) -> tuple[list[list[str]], Image.Image]:
    from anyres.data.detection_views import pad
    from anyres.tasks.detection import paste_masks

    image, view, way = _open(model, item, size)
    x, sizes = pad([view], way.mean, way.std)  # as in evaluation
    with layers_watched(model.head) as finite:
        found = model(x.to(device), sizes)[0]
    check_found(model, [found], finite, item.name)
    kept = found["scores"] >= threshold
    found = {name: values[kept].cpu() for name, values in found.items()}
    across, down = image.width / view.shape[1], image.height / view.shape[0]
    boxes = found["boxes"] * torch.tensor([across, down, across, down])
    masks = keypoints = None
    if "masks" in found:
        masks = paste_masks(found["masks"], boxes, (image.height, image.width)).numpy()
    if "keypoints" in found:
        keypoints = (found["keypoints"] * torch.tensor([across, down, 1.0])).numpy()
    names, labels, scores = label_names(model), found["labels"].tolist(), found["scores"].tolist()
    cells = [
        [names[label], f"{score:.2f}", *(f"{value:.0f}" for value in box)]
        for label, score, box in zip(labels, scores, boxes.tolist(), strict=True)
    ]
    return cells, draw_detections(image, boxes.numpy(), labels, scores, names, masks, keypoints)


@torch.inference_mode()
def _recognise(
    model: Any, item: Item, size: Size, topk: int, threshold: float, device: torch.device
) -> tuple[list[list[str]], Image.Image]:
    from anyres.data.video_views import ClipTest
    from anyres.inference.preparation import sampling_of

    way = preparation_for(model)
    test = ClipTest(size, sampling_of(model), way.mean, way.std, crop_pct=way.crop_pct, interpolation=way.interpolation)
    item = item._replace(label=0)
    sample = test.prepare(item)
    batch = test.collate([item], [sample])
    logits = model(test.view(batch.pixels[:, 0]).to(device)).float()
    check_outputs(model, bool(logits.isfinite().all()), item.name)
    top = logits.softmax(-1)[0].cpu()
    values, indices = top.topk(min(topk, len(top)))
    names = label_names(model)
    cells = [[names[i], f"{value:.4f}"] for value, i in zip(values.tolist(), indices.tolist(), strict=True)]
    frames = sample.pixels[0] if sample.pixels.ndim == 5 else np.repeat(sample.pixels[0][..., None], 3, axis=-1)
    return cells, draw_clip(frames, [f"{name}  {value}" for name, value in cells])
