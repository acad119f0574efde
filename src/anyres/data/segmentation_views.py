"""Segmentation views: training crops at one or several sizes, and whole images for evaluation."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from anyres.data.base import Item
from anyres.data.decode import MAX_PIXELS, open_picture
from anyres.data.fitting import OwnSize, fit, fit_test
from anyres.data.samples import EvalBatch, EvalSample
from anyres.data.segmentation import IGNORED
from anyres.data.views import DRAFT_MARGIN, Box, _resize, normalize, to_batch
from anyres.errors import UserError
from anyres.shapes import Size

CROP_ATTEMPTS = 10

Pixels = tuple[np.ndarray, np.ndarray]
"""An image (h, w) or (h, w, 3) and its labels (h, w), both uint8."""


@dataclass(frozen=True)
class SegmentationViews:
    """Training views of segmentation images: random scale, crop, flip, photometric jitter and padding.

    The image is resized with its aspect ratio kept (see `fit`): its short side to that of the view times a factor drawn
    from `scale`, and its long side to at most `longest` times that. Up to ten crops of the view's size are drawn, and
    the first is used in which no class covers more than `largest_share` of the pixels that are not ignored; if there is
    none, the tenth is used. `hflip` is the probability of a flip. `photometric` turns on random shifts of brightness,
    contrast, saturation and hue (see `jitter_colours`). Images smaller than the crop are padded at the right and bottom
    with the mean colour, which is 0 after normalisation, and with ignored labels.

    `separate_aug` True crops every view independently. False crops only the largest, and resizes that crop for the
    smaller views: images by bilinear interpolation (antialiased), labels by nearest neighbour. Source: the usual ADE20K
    protocol, as in Swin (Liu et al., ICCV 2021, section A2.3).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: Sequence[float] = (0.5, 2.0)
    longest: float = 4.0
    largest_share: float = 0.75
    hflip: float = 0.5
    photometric: bool = True
    separate_aug: bool = True
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 16:
            raise UserError(f"scale {self.scale} must be two factors, 0 < low <= high <= 16")
        if self.longest < 1:
            raise UserError(f"longest {self.longest} must be at least 1: it is a multiple of the short side")
        if not 0 < self.largest_share <= 1:
            raise UserError(f"largest_share {self.largest_share} must be above 0 and at most 1 (off)")
        if not 0 <= self.hflip <= 1:
            raise UserError(f"hflip {self.hflip} must be a probability from 0 to 1")

    def augment(self, item: Item, sizes: Sequence[Size], rng: random.Random) -> list[Pixels]:
        """Decode `item` once and make its crops at `sizes` (from large to small), not yet padded.

        If the views share a crop, only the largest is made. Raises BadImage.
        """
        drawn = list(sizes) if self.separate_aug else list(sizes[:1])
        labels = Image.fromarray(item.label.labels(item.name, self.max_pixels))
        full: Size = (labels.height, labels.width)
        with open_picture(item.data, item.name, len(self.mean), self.max_pixels, full) as picture:
            crops = [self._crop(rng, labels, size) for size in drawn]
            needed = max(
                max(labels.width / (right - left), labels.height / (bottom - top))
                for (left, top, right, bottom), labels in crops
            )
            image = picture.decode(DRAFT_MARGIN * needed)
        samples = []
        for box, labels in crops:
            view = _resize(image, (labels.height, labels.width), box, full, "bilinear")
            if rng.random() < self.hflip:
                view, labels = (each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in (view, labels))
            if self.photometric:
                view = jitter_colours(view, rng)
            samples.append((np.asarray(view), np.asarray(labels)))
        return samples

    def _crop(self, rng: random.Random, labels: Image.Image, size: Size) -> tuple[Box, Image.Image]:
        """Draw a crop; returns its box in the image, and its labels at view scale, at most `size`."""
        full = (labels.height, labels.width)
        short = max(1, round(min(size) * rng.uniform(*self.scale)))
        height, width = fit(*full, (short, short), self.longest)
        shape = min(size[0], height), min(size[1], width)
        y, x = full[0] / height, full[1] / width
        for _ in range(CROP_ATTEMPTS):
            top, left = rng.uniform(0, height - shape[0]), rng.uniform(0, width - shape[1])
            box = (left * x, top * y, (left + shape[1]) * x, (top + shape[0]) * y)
            crop = _resize(labels, shape, box, full, "nearest")
            pixels = crop.histogram()[:IGNORED]
            if 0 < max(pixels) <= self.largest_share * sum(pixels):
                break
        return box, crop

    def collate(
        self, items: Sequence[Item], samples: Sequence[list[Pixels]], sizes: Sequence[Size]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return views (B, C, H_i, W_i) float32 and their labels (B, H_i, W_i) uint8, IGNORED in the padding."""
        padded = [
            self._pad([sample[place] for sample in samples], size)
            for place, size in enumerate(sizes[: len(samples[0])])
        ]
        views, targets = [view for view, _ in padded], [labels for _, labels in padded]
        for size in sizes[len(padded) :]:
            views.append(F.interpolate(views[0], size, mode="bilinear", antialias=True))
            targets.append(F.interpolate(targets[0][:, None], size, mode="nearest-exact")[:, 0])
        return views, targets

    def _pad(self, pixels: Sequence[Pixels], size: Size) -> tuple[Tensor, Tensor]:
        images = torch.zeros(len(pixels), len(self.mean), *size)
        targets = torch.full((len(pixels), *size), IGNORED, dtype=torch.uint8)
        for row, (image, labels) in enumerate(pixels):
            inside = (..., slice(labels.shape[0]), slice(labels.shape[1]))
            images[row][inside] = normalize(to_batch([image]), self.mean, self.std)[0]
            targets[row][inside] = torch.from_numpy(np.array(labels))
        return images, targets


def jitter_colours(image: Image.Image, rng: random.Random) -> Image.Image:
    """Randomly shift brightness and hue, and scale contrast and saturation, each with probability 1/2.

    Brightness shifts by up to 32 of 255 and hue by up to a tenth of a turn; contrast and saturation scale by 0.5 to
    1.5. Contrast comes first or last, at random.

    Grey images (mode "L") get only brightness and contrast. Source: the photometric distortion of SSD (Liu et al., ECCV
    2016), which segmentation protocols adopted. torchvision's `RandomPhotometricDistort` uses a different distribution
    (its brightness is a factor, and its contrast keeps the mean) and draws from torch's global generator.
    """
    levels = np.arange(256.0)
    brightness = rng.uniform(-32, 32) if rng.random() < 0.5 else 0.0
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = rng.uniform(-0.1, 0.1) if rng.random() < 0.5 else 0.0
    early, late = (contrast, 1.0) if rng.random() < 0.5 else (1.0, contrast)
    image = _map_levels(image, _rounded(_rounded(levels + brightness) * early))
    if image.mode == "RGB" and (saturation, hue) != (1.0, 0.0):
        tables = (np.rint(levels + 256 * hue) % 256, _rounded(levels * saturation), levels)
        image = _map_levels(image.convert("HSV"), *tables).convert("RGB")
    return _map_levels(image, _rounded(levels * late))


def _rounded(levels: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = np.clip(np.rint(levels), 0, 255)
    return rounded


def _map_levels(image: Image.Image, *tables: np.ndarray) -> Image.Image:
    """Map each level through the table (256,) of its channel, or through one table for all channels."""
    if all(np.array_equal(table, np.arange(256)) for table in tables):
        return image
    table = np.concatenate(tables * (len(image.getbands()) // len(tables)))
    return image.point(table.astype(int).tolist())


@dataclass(frozen=True)
class SegmentationTest:
    """The eval transform for whole segmentation images.

    Images are resized bilinearly to fit `size` (see `fit`), with each side rounded up to a multiple of `divisor` (32 in
    the published tests of PVT, P2T and GPViT). Labels keep their original size.
    """

    size: Size | OwnSize
    mean: tuple[float, ...]
    std: tuple[float, ...]
    longest: float = 4.0
    divisor: int = 1
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if not isinstance(self.size, OwnSize) and min(self.size) < 1:
            raise UserError(f"size {self.size} must be a pair (height, width) of positive integers")
        if self.longest < 1:
            raise UserError(f"longest {self.longest} must be at least 1: it is a multiple of the short side")
        if self.divisor < 1:
            raise UserError(f"divisor {self.divisor} must be at least 1")

    def prepare(self, item: Item) -> EvalSample:
        """Decode and resize an image, and decode its labels if it has any. Raises BadImage."""
        labels: np.ndarray | None = None if item.label is None else item.label.labels(item.name, self.max_pixels)
        marked = None if labels is None else (labels.shape[0], labels.shape[1])
        with open_picture(item.data, item.name, len(self.mean), self.max_pixels, marked) as picture:
            height, width = full = picture.size
            shape = fit_test(full, self.size, self.longest, self.divisor, item.name)
            image = picture.decode(DRAFT_MARGIN * max(shape[0] / height, shape[1] / width))
        view = _resize(image, shape, (0, 0, full[1], full[0]), full, "bilinear")
        return EvalSample(np.asarray(view), full, labels)

    def shape(self, sample: EvalSample) -> Hashable:
        """Return the shapes before and after resizing, since the maps of a batch all have one size."""
        return sample.pixels.shape, sample.full, np.shape(sample.truth)

    def collate(self, items: Sequence[Item], samples: Sequence[EvalSample]) -> EvalBatch:
        images = normalize(to_batch([sample.pixels for sample in samples]), self.mean, self.std)
        labelled = all(sample.truth is not None for sample in samples)
        truth = torch.from_numpy(np.stack([sample.truth for sample in samples])) if labelled else None
        names, full = [item.name for item in items], [sample.full for sample in samples]
        return EvalBatch(images, truth, names, full, list(range(len(items))))
