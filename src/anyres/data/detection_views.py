"""Pictures with marked objects at one or several sizes: scaled, cropped and mirrored with their boxes, masks and
keypoints, as padded batches."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anyres.data import rle
from anyres.data.base import Item
from anyres.data.decode import open_picture
from anyres.data.fitting import fit, limits
from anyres.data.objects import Objects, Segment
from anyres.data.samples import EvalBatch, EvalSample
from anyres.data.views import DRAFT_MARGIN, Box, _resize, normalize, to_batch
from anyres.errors import UserError
from anyres.shapes import Size

LONGEST = 1333 / 800
DIVISOR = 32
SHORT_SIDES = tuple(side / 800 for side in range(480, 801, 32))
"""Of the multi-scale recipe, as shares of the full size; likewise the two below."""
FIRST_SIDES = (400 / 800, 500 / 800, 600 / 800)
WINDOW_SIDES = (384 / 800, 600 / 800)


class DetectionView(NamedTuple):
    """A batch of images at one size, normalised and padded with zeros at the right and bottom.

    `targets[b]` holds boxes (n, 4) float32 as x1, y1, x2, y2 in pixels of the view and labels (n,) int64 from 0, and
    where the source was asked for them, masks (n, h, w) uint8 of the image without its padding and keypoints (n, K, 3)
    float32 (x, y, visibility 0 to 2). Empty in evaluation.
    """

    images: Tensor  # (B, C, H, W), H and W multiples of 32
    sizes: list[Size]  # (height, width) of each image without its padding
    targets: list[dict[str, Tensor]]


class Crop(NamedTuple):
    """What part of a picture a view shows, and how: `box` in its pixels, scaled to `size`, then mirrored if `flip`."""

    box: Box
    size: Size
    flip: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the view per pixel of the picture, along x and y."""
        left, top, right, bottom = self.box
        return self.size[1] / (right - left), self.size[0] / (bottom - top)

    def move(self, points: np.ndarray) -> np.ndarray:
        """Points (…, 2) of the picture, x and y, to pixels of the view."""
        moved = (points - self.box[:2]) * self.scale
        if self.flip:
            moved[..., 0] = self.size[1] - moved[..., 0]
        return moved


class DetectionSample(NamedTuple):
    """The views of one picture, large to small: uint8 (h, w) or (h, w, 3), and what is in them."""

    pixels: list[np.ndarray]
    targets: list[dict[str, np.ndarray]]


@dataclass(frozen=True)
class DetectionViews:
    """Training views of pictures with marked objects, for the loader; `mean`, `std` and `flip_pairs` are the source's.

    Every view is drawn on its own: scaled by `fit` with `longest`, mirrored with probability `hflip`. `multi_scale`
    draws the short side from 480, 512, …, 800 eight-hundredths of the size; before that, with probability 1/2, it
    becomes 400, 500 or 600 eight-hundredths and a crop with sides of 384 to 600 is cut out (DETR, Carion et al.,
    ECCV 2020; the Swin setting). `jitter` (0.1, 2.0) instead scales the picture to that share of the size and
    cuts a crop, or pads to one, of exactly the size (large-scale jitter, Ghiasi et al., CVPR 2021).

    An object stays while any of its box is inside the crop, and any of its mask if masks are asked for. Crowds and
    objects without a usable box are not trained (see `Objects.trainable`).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip_pairs: tuple[tuple[int, int], ...] = ()
    longest: float = LONGEST
    hflip: float = 0.5
    multi_scale: bool = False
    jitter: Sequence[float] = ()

    def __post_init__(self) -> None:
        if not self.longest >= 1:
            raise UserError(f"longest {self.longest} is the long side over the short side: it must be at least 1")
        if not 0 <= self.hflip <= 1:
            raise UserError(f"hflip {self.hflip} must be a probability from 0 to 1")
        if self.jitter:
            if len(self.jitter) != 2 or not 0 < self.jitter[0] <= self.jitter[1] < math.inf:
                raise UserError(f"jitter {self.jitter} must be two positive shares of the size, low <= high")
            if self.multi_scale:
                raise UserError("multi_scale and jitter are two ways to scale an image: choose one")

    def augment(self, item: Item, sizes: Sequence[Size], rng: random.Random) -> DetectionSample:
        """Decode `item` once and draw its views at `sizes`. Raises BadImage."""
        crops = [self._draw(rng, item.label.size, size) for size in sizes]
        pixels = _show(item, crops, len(self.mean))
        return DetectionSample(pixels, [_targets(item.label, crop, self.flip_pairs) for crop in crops])

    def collate(
        self, items: Sequence[Item], samples: Sequence[DetectionSample], sizes: Sequence[Size]
    ) -> tuple[list[DetectionView], list[list[dict[str, Tensor]]]]:
        """A `DetectionView` for each size, and its targets once more."""
        views = []
        for place, size in enumerate(sizes):
            least = size if self.jitter else (1, 1)
            images, fitted = pad([sample.pixels[place] for sample in samples], self.mean, self.std, least)
            targets = [
                {name: torch.from_numpy(values) for name, values in sample.targets[place].items()} for sample in samples
            ]
            views.append(DetectionView(images, fitted, targets))
        return views, [view.targets for view in views]

    def _draw(self, rng: random.Random, full: Size, size: Size) -> Crop:
        height, width = full
        flip = rng.random() < self.hflip
        if self.jitter:
            return Crop(*_jitter(rng, height, width, size, rng.uniform(*self.jitter)), flip)
        box: Box = (0, 0, width, height)
        if not self.multi_scale:
            return Crop(box, fit(height, width, size, self.longest), flip)
        short, long = limits(size, self.longest)
        if rng.random() < 0.5:
            box = _cut(rng, height, width, short)
        side = max(1, round(rng.choice(SHORT_SIDES) * short))
        return Crop(box, fit(box[3] - box[1], box[2] - box[0], (side, side), long / side), flip)


def _cut(rng: random.Random, height: int, width: int, short: int) -> Box:
    """A crop of the multi-scale recipe in a picture whose short side shall become about `short`."""
    scale = rng.choice(FIRST_SIDES) * short / min(height, width)
    low, high = (share * short / scale for share in WINDOW_SIDES)
    w, h = (rng.uniform(low, min(side, high)) for side in (width, height))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return left, top, left + w, top + h


def _jitter(rng: random.Random, height: int, width: int, size: Size, share: float) -> tuple[Box, Size]:
    """The crop of large-scale jitter: the picture fitted into `share` of the size, and cut where it is larger."""
    scale = share * min(size[0] / height, size[1] / width)
    full = max(1, round(height * scale)), max(1, round(width * scale))
    h, w = min(full[0], size[0]), min(full[1], size[1])
    top, left = rng.uniform(0, full[0] - h), rng.uniform(0, full[1] - w)
    x, y = width / full[1], height / full[0]
    return (left * x, top * y, (left + w) * x, (top + h) * y), (h, w)


def _show(item: Item, crops: Sequence[Crop], in_chans: int) -> list[np.ndarray]:
    """Decode the picture once and make its views: uint8 (h, w) or (h, w, 3). Raises BadImage."""
    with open_picture(item.data, item.name, in_chans, marked=item.label.size) as picture:
        image = picture.decode(DRAFT_MARGIN * max(max(crop.scale) for crop in crops))
    return [np.asarray(_frame(image, crop, item.label.size)) for crop in crops]


def _frame(image: Image.Image, crop: Crop, full: Size) -> Image.Image:
    view = _resize(image, crop.size, crop.box, full, "bilinear")
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else view


def _targets(objects: Objects, crop: Crop, flip_pairs: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """What of the trainable objects is in the crop, in its pixels."""
    height, width = crop.size
    corners = crop.move(objects.boxes.reshape(-1, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    boxes = np.clip(boxes, 0, (width, height, width, height)).astype(np.float32)
    kept = np.flatnonzero(objects.trainable() & (boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    targets: dict[str, np.ndarray] = {}
    if objects.segments is not None:
        masks = {place: _mask(objects.segments[place], objects.size, crop) for place in kept.tolist()}
        kept = np.array([place for place, mask in masks.items() if mask.any()], dtype=np.int64)
        targets["masks"] = np.zeros((len(kept), height, width), dtype=np.uint8)
        for row, place in zip(targets["masks"], kept.tolist(), strict=True):
            row[:] = masks[place]
    targets["boxes"], targets["labels"] = boxes[kept], objects.labels[kept]
    if objects.keypoints is not None:
        targets["keypoints"] = _move_keypoints(objects.keypoints[kept], crop, flip_pairs)
    return targets


def _mask(segment: Segment, full: Size, crop: Crop) -> np.ndarray:
    """A mask in the pixels of the view: uint8 (h, w). Polygons are moved first; run lengths are scaled as pixels."""
    if isinstance(segment, np.ndarray):
        image = Image.fromarray(255 * rle.decode(segment, full))
        return (np.asarray(_frame(image, crop, full)) >= 128).astype(np.uint8)
    assert segment
    return rle.draw([crop.move(polygon.reshape(-1, 2)).ravel() for polygon in segment], crop.size)


def _move_keypoints(keypoints: np.ndarray, crop: Crop, flip_pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Keypoints (n, K, 3) in pixels of the view, float32; those outside and those not marked are zeros."""
    moved = keypoints.copy()
    moved[..., :2] = crop.move(keypoints[..., :2])
    if crop.flip:
        places = np.arange(keypoints.shape[1])
        for one, other in flip_pairs:
            places[one], places[other] = other, one
        moved = moved[:, places]
    inside = (moved[..., :2] >= 0).all(axis=-1) & (moved[..., :2] <= crop.size[::-1]).all(axis=-1)
    moved[~(inside & (moved[..., 2] > 0))] = 0
    return moved.astype(np.float32)


def pad(
    pixels: Sequence[np.ndarray], mean: tuple[float, ...], std: tuple[float, ...], least: Size = (1, 1)
) -> tuple[Tensor, list[Size]]:
    """Normalise images of any sizes and pad them with zeros at the right and bottom to one that holds all and `least`,
    both sides multiples of 32: (B, C, H, W) float32, and the size (h, w) of each."""
    sizes = [(image.shape[0], image.shape[1]) for image in pixels]
    height, width = (-(-max(sides) // DIVISOR) * DIVISOR for sides in zip(least, *sizes, strict=True))
    batch = torch.zeros(len(pixels), len(mean), height, width)
    for row, image, (h, w) in zip(batch, pixels, sizes, strict=True):
        row[:, :h, :w] = normalize(to_batch([image]), mean, std)[0]
    return batch, sizes


@dataclass(frozen=True)
class DetectionTest:
    """Pictures as published tests take them, scaled by `fit`, for the evaluation loader."""

    size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    longest: float = LONGEST

    def prepare(self, item: Item) -> EvalSample:
        """Decode and scale: uint8 (h, w) or (h, w, 3). Raises BadImage."""
        marked = None if item.label is None else item.label.size
        with open_picture(item.data, item.name, len(self.mean), marked=marked) as picture:
            height, width = full = picture.size
            shape = fit(height, width, self.size, self.longest)
            image = picture.decode(DRAFT_MARGIN * max(shape[0] / height, shape[1] / width))
        view = _resize(image, shape, (0, 0, full[1], full[0]), full, "bilinear")
        return EvalSample(np.asarray(view), full, item.label)

    def collate(self, items: Sequence[Item], samples: Sequence[EvalSample]) -> list[EvalBatch]:
        """The padded batch, and what is marked in each picture at its own size."""
        view = DetectionView(*pad([sample.pixels for sample in samples], self.mean, self.std), [])
        names, full = [item.name for item in items], [sample.full for sample in samples]
        labelled = all(item.label is not None for item in items)
        truth = [item.label for item in items] if labelled else None
        return [EvalBatch(view, truth, names, full, list(range(len(items))))]
