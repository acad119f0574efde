"""Detection views at one or several sizes, as padded batches.

Images are scaled, cropped and flipped together with their boxes, masks and keypoints.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anyres.data import rle
from anyres.data.base import Item
from anyres.data.decode import open_picture
from anyres.data.fitting import OwnSize, fit, fit_test, limits
from anyres.data.objects import Objects, Segment
from anyres.data.samples import EvalBatch, EvalSample
from anyres.data.views import DRAFT_MARGIN, Box, _resize, normalize, to_batch
from anyres.errors import UserError
from anyres.shapes import Size

LONGEST = 1333 / 800
DIVISOR = 32
SHORT_SIDES = tuple(side / 800 for side in range(480, 801, 32))
"""Short sides of the multi-scale recipe as shares of the full size. The two constants below use the same unit."""
FIRST_SIDES = (400 / 800, 500 / 800, 600 / 800)
WINDOW_SIDES = (384 / 800, 600 / 800)


class DetectionView(NamedTuple):
    """A batch of images at one size, normalised and zero-padded at the right and bottom.

    `targets[b]` has "boxes" (n, 4) float32 as x1, y1, x2, y2 in pixels of the view, and "labels" (n,) int64 from 0. If
    the source was opened with them, it also has "masks" (n, h, w) uint8 at the image size without padding, and
    "keypoints" (n, K, 3) float32 (x, y, visibility 0 to 2). `targets` is empty in evaluation.
    """

    images: Tensor  # (B, C, H, W), H and W multiples of 32
    sizes: list[Size]  # (height, width) of each image without padding
    targets: list[dict[str, Tensor]]


class Crop(NamedTuple):
    """The part of an image that a view shows: `box` in image pixels, scaled to `size`, then flipped if `flip`."""

    box: Box
    size: Size
    flip: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """View pixels per image pixel, along x and y."""
        left, top, right, bottom = self.box
        return self.size[1] / (right - left), self.size[0] / (bottom - top)

    def move(self, points: np.ndarray) -> np.ndarray:
        """Convert points (…, 2), x and y in image pixels, to pixels of the view."""
        moved = (points - self.box[:2]) * self.scale
        if self.flip:
            moved[..., 0] = self.size[1] - moved[..., 0]
        return moved


class DetectionSample(NamedTuple):
    """The views of one image, from large to small, uint8 (h, w) or (h, w, 3), with their targets."""

    pixels: list[np.ndarray]
    targets: list[dict[str, np.ndarray]]


@dataclass(frozen=True)
class DetectionViews:
    """Training views of detection images, for the loader; `mean`, `std` and `flip_pairs` are those of the source.

    Every view is drawn independently: scaled by `fit` with `longest`, and flipped with probability `hflip`.
    `multi_scale` draws the short side from 480, 512, …, 800 eight-hundredths of the size. With probability 1/2 the
    short side is first resized to 400, 500 or 600 eight-hundredths, and a crop with sides of 384 to 600
    eight-hundredths is cut out (DETR, Carion et al., ECCV 2020; the setting used for Swin). `jitter` (0.1, 2.0) instead
    scales the image to a random share of the size in that range, and crops or pads it to exactly the size (large-scale
    jitter, Ghiasi et al., CVPR 2021).

    An object is kept if any part of its box is inside the crop and, if masks are loaded, any part of its mask. Crowds
    and objects without a usable box are not trained on (see `Objects.trainable`).
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
        """Return a `DetectionView` for each size, and the targets of each view as a separate list."""
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
    """Draw the crop of the multi-scale recipe, in an image whose short side is to become about `short`."""
    scale = rng.choice(FIRST_SIDES) * short / min(height, width)
    low, high = (share * short / scale for share in WINDOW_SIDES)
    w, h = (rng.uniform(low, min(side, high)) for side in (width, height))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return left, top, left + w, top + h


def _jitter(rng: random.Random, height: int, width: int, size: Size, share: float) -> tuple[Box, Size]:
    """Draw the crop of large-scale jitter: fit the image into `share` of `size`, then cut off what exceeds `size`."""
    scale = share * min(size[0] / height, size[1] / width)
    full = max(1, round(height * scale)), max(1, round(width * scale))
    h, w = min(full[0], size[0]), min(full[1], size[1])
    top, left = rng.uniform(0, full[0] - h), rng.uniform(0, full[1] - w)
    x, y = width / full[1], height / full[0]
    return (left * x, top * y, (left + w) * x, (top + h) * y), (h, w)


def _show(item: Item, crops: Sequence[Crop], in_chans: int) -> list[np.ndarray]:
    """Decode the image once and make its views: uint8 (h, w) or (h, w, 3). Raises BadImage."""
    with open_picture(item.data, item.name, in_chans, marked=item.label.size) as picture:
        image = picture.decode(DRAFT_MARGIN * max(max(crop.scale) for crop in crops))
    return [np.asarray(_frame(image, crop, item.label.size)) for crop in crops]


def _frame(image: Image.Image, crop: Crop, full: Size) -> Image.Image:
    view = _resize(image, crop.size, crop.box, full, "bilinear")
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else view


def _targets(objects: Objects, crop: Crop, flip_pairs: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Return the targets of a crop: the trainable objects inside it, in pixels of the view."""
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
    """Return a mask in view pixels, uint8 (h, w). Polygons are transformed exactly; run lengths are resampled."""
    if isinstance(segment, np.ndarray):
        image = Image.fromarray(255 * rle.decode(segment, full))
        return (np.asarray(_frame(image, crop, full)) >= 128).astype(np.uint8)
    assert segment
    return rle.draw([crop.move(polygon.reshape(-1, 2)).ravel() for polygon in segment], crop.size)


def _move_keypoints(keypoints: np.ndarray, crop: Crop, flip_pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Convert keypoints (n, K, 3) to pixels of the view, float32; those outside or not annotated become zeros."""
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
    """Normalise images of any sizes and zero-pad them at the right and bottom to one size.

    The size holds every image and `least`, with both sides multiples of 32. Returns the batch (B, C, H, W) float32 and
    the size (h, w) of each image without padding.
    """
    sizes = [(image.shape[0], image.shape[1]) for image in pixels]
    height, width = padded([least, *sizes])
    batch = torch.zeros(len(pixels), len(mean), height, width)
    for row, image, (h, w) in zip(batch, pixels, sizes, strict=True):
        row[:, :h, :w] = normalize(to_batch([image]), mean, std)[0]
    return batch, sizes


def padded(sizes: Sequence[Size]) -> Size:
    """Return the smallest size that holds these and whose sides are multiples of 32."""
    height, width = (-(-max(sides) // DIVISOR) * DIVISOR for sides in zip(*sizes, strict=True))
    return height, width


@dataclass(frozen=True)
class DetectionTest:
    """The evaluation transform of published detection tests, scaling by `fit`, for the loader."""

    size: Size | OwnSize
    mean: tuple[float, ...]
    std: tuple[float, ...]
    longest: float = LONGEST

    def prepare(self, item: Item) -> EvalSample:
        """Decode and scale an image: uint8 (h, w) or (h, w, 3). Raises BadImage."""
        marked = None if item.label is None else item.label.size
        with open_picture(item.data, item.name, len(self.mean), marked=marked) as picture:
            height, width = full = picture.size
            shape = fit_test(full, self.size, self.longest, 1, item.name)
            image = picture.decode(DRAFT_MARGIN * max(shape[0] / height, shape[1] / width))
        view = _resize(image, shape, (0, 0, full[1], full[0]), full, "bilinear")
        return EvalSample(np.asarray(view), full, item.label)

    def shape(self, sample: EvalSample) -> Hashable:
        """Return the padded size: more padding would change what the network sees of the image."""
        return padded([sample.pixels.shape[:2]])

    def collate(self, items: Sequence[Item], samples: Sequence[EvalSample]) -> EvalBatch:
        """Return the padded batch, with the annotations of each image at its original size."""
        view = DetectionView(*pad([sample.pixels for sample in samples], self.mean, self.std), [])
        names, full = [item.name for item in items], [sample.full for sample in samples]
        labelled = all(item.label is not None for item in items)
        truth = [item.label for item in items] if labelled else None
        return EvalBatch(view, truth, names, full, list(range(len(items))))
