"""Image views: from one decoded image to one or several normalised views."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from anyres.data.base import Item
from anyres.data.decode import MAX_PIXELS, open_picture
from anyres.data.fitting import OwnSize
from anyres.data.samples import EvalBatch, EvalSample, labels_of
from anyres.data.seeding import seed_globals
from anyres.errors import UserError
from anyres.shapes import Size

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# JPEG's reduced-size decoding is a box filter, whereas published preprocessing resamples from all pixels. The last
# factor of two is left to the resampling, so that results differ by only a level or two on average.
DRAFT_MARGIN = 2.0

CROP_FILLS = ("mean", "border")

Transform = Callable[[Image.Image], Image.Image]
Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels, not rounded."""


@dataclass(frozen=True)
class Augmentation:
    """How a training view is made: crop, flip, RandAugment or colour jitter, normalisation, random erasing.

    `crop_scale` is the range of the crop's share of the image area. `crop_ratio` is the range of its width over height,
    relative to the view's own aspect ratio (1 for a square). If `crop_scale` reaches beyond 1, crops can also zoom out:
    the image is placed at random on a canvas (the scale jitter of Ghiasi et al., "Simple Copy-Paste", CVPR 2021), and
    the share is drawn log-uniformly. `crop_fill` is the colour of the canvas: the "mean" of the dataset, or the median
    of the image's "border", which suits drawings. `auto_augment` is one of timm's strings
    ("rand-m9-mstd0.5-inc1", "augmix-m5", "original") or None; if it is set, `color_jitter` has no effect. `erasing` is
    the probability of random erasing with per-pixel normal noise.

    `separate_aug` True augments every view independently. False augments only the largest, and makes the smaller views
    by bicubic (antialiased) resizing; normalisation and erasing are still applied to each view. Source: ResFormer (Tian
    et al., CVPR 2023).
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.3
    erasing: float = 0.25
    interpolation: str = "bicubic"
    separate_aug: bool = True
    crop_fill: str = "mean"

    def __post_init__(self) -> None:
        # Lists (from a YAML file) become tuples, because this object is a key of the caches below.
        object.__setattr__(self, "crop_scale", tuple(self.crop_scale))
        object.__setattr__(self, "crop_ratio", tuple(self.crop_ratio))
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 16:
            raise UserError(f"crop_scale {self.crop_scale} must be two shares of the image area, 0 < low <= high <= 16")
        if len(self.crop_ratio) != 2 or not 0 < self.crop_ratio[0] <= self.crop_ratio[1] < math.inf:
            raise UserError(f"crop_ratio {self.crop_ratio} must be two positive numbers, low <= high")
        for name in ("hflip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} must be a probability from 0 to 1")
        if not 0 <= self.color_jitter <= 1:
            raise UserError(f"color_jitter {self.color_jitter} must be from 0 (off) to 1")
        check_interpolation(self.interpolation)
        if self.crop_fill not in CROP_FILLS:
            raise UserError(f"crop_fill {self.crop_fill!r} must be one of {', '.join(CROP_FILLS)}")
        if self.auto_augment:
            _photometric(self, (32, 32), (0.5, 0.5, 0.5))


def check_interpolation(name: str) -> None:
    """Raise UserError for an unknown interpolation."""
    if name not in RESAMPLING:
        raise UserError(f"interpolation {name!r} must be one of {', '.join(RESAMPLING)}")


class Sample(NamedTuple):
    """The views of one image before normalisation, uint8 (H, W) or (H, W, 3), and the erasing seed of each view."""

    pixels: list[np.ndarray]
    erasing_seeds: list[int]


def augment(
    item: Item,
    sizes: Sequence[Size],
    augmentation: Augmentation,
    rng: random.Random,
    mean: tuple[float, ...],
    max_pixels: int = MAX_PIXELS,
) -> Sample:
    """Decode `item` once and make its views at `sizes` (from large to small), or only the largest if they share it.

    Seeds the global generators if a transform uses them. Raises BadImage.
    """
    drawn = list(sizes) if augmentation.separate_aug else list(sizes[:1])
    with open_picture(item.data, item.name, len(mean), max_pixels) as picture:
        height, width = full = picture.size
        boxes = [draw_box(rng, width, height, augmentation, size) for size in drawn]
        needed = max(
            max(size[1] / (right - left), size[0] / (bottom - top))
            for size, (left, top, right, bottom) in zip(drawn, boxes, strict=True)
        )
        image = picture.decode(DRAFT_MARGIN * needed)
    pixels = []
    for size, box in zip(drawn, boxes, strict=True):
        fill = _border_colour(image) if augmentation.crop_fill == "border" else [255 * value for value in mean]
        view = _resize(image, size, box, full, augmentation.interpolation, fill)
        if rng.random() < augmentation.hflip:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        transform = _photometric(augmentation, size, mean)
        if transform is not None:
            seed_globals(rng.getrandbits(32))
            view = transform(view)
        pixels.append(np.asarray(view))
    return Sample(pixels, [rng.getrandbits(32) for _ in sizes])


def draw_box(rng: random.Random, width: int, height: int, augmentation: Augmentation, size: Size) -> Box:
    """Draw a crop with random area, aspect ratio and position; after ten failed attempts, use the largest centre crop.

    This is torchvision's RandomResizedCrop with two differences: corners are not rounded to whole pixels (which would
    leave tiny images with only a handful of crops), and the ratio is relative to the view's own. If `crop_scale` allows
    zooming out, every draw is accepted, and a crop side longer than the image's contains all of that side.
    """
    shape = size[1] / size[0]
    low, high = augmentation.crop_ratio[0] * shape, augmentation.crop_ratio[1] * shape
    for _ in range(10):
        area = width * height * _draw_scale(rng, augmentation.crop_scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if (w <= width and h <= height) or augmentation.crop_scale[1] > 1:
            left, top = (rng.uniform(min(0, rest), max(0, rest)) for rest in (width - w, height - h))
            return left, top, left + w, top + h
    ratio = min(max(width / height, low), high)
    w, h = min(width, height * ratio), min(height, width / ratio)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def _draw_scale(rng: random.Random, scale: tuple[float, float]) -> float:
    """Draw the crop's share of the image area.

    The share is uniform as published, or log-uniform if the range reaches beyond 1, so that zooming in and zooming out
    by the same factor are equally likely.
    """
    if scale[1] <= 1:
        return rng.uniform(*scale)
    return math.exp(rng.uniform(math.log(scale[0]), math.log(scale[1])))


def _resize(
    image: Image.Image, size: Size, box: Box, full: Size, interpolation: str, fill: Sequence[float] = ()
) -> Image.Image:
    """Resample `box` to `size`, where `box` refers to an image of size `full` and `image` may be decoded smaller.

    Areas of the box outside the image get the colour `fill` (0 to 255), which is needed only if there can be any.
    """
    left, top, right, bottom = box
    # The part of the view that the image covers, in view pixels: all of it unless the box extends beyond the image.
    across, down = size[1] / (right - left), size[0] / (bottom - top)
    x0, y0 = round(max(-left, 0) * across), round(max(-top, 0) * down)
    x1 = size[1] - round(max(right - full[1], 0) * across)
    y1 = size[0] - round(max(bottom - full[0], 0) * down)
    x, y = image.width / full[1], image.height / full[0]
    inside = (max(left * x, 0), max(top * y, 0), min(right * x, image.width), min(bottom * y, image.height))
    covered = (max(x1 - x0, 1), max(y1 - y0, 1))
    view = image.resize(covered, RESAMPLING[interpolation], inside)
    if covered == (size[1], size[0]):
        return view
    colour = tuple(map(round, fill))
    canvas = Image.new(image.mode, (size[1], size[0]), colour if len(colour) > 1 else colour[0])
    canvas.paste(view, (min(x0, size[1] - 1), min(y0, size[0] - 1)))
    return canvas


def _border_colour(image: Image.Image) -> list[float]:
    """Return the median colour of the outermost pixels, per channel from 0 to 255."""
    pixels = np.asarray(image)
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    median = np.median(np.concatenate(edges), axis=0)
    return [float(value) for value in np.atleast_1d(median)]


@lru_cache(maxsize=64)
def _photometric(augmentation: Augmentation, size: Size, mean: tuple[float, ...]) -> Transform | None:
    """Return the colour and shape transform that follows the flip, with timm's settings for this size, or None."""
    if augmentation.auto_augment:
        return _auto_augment(augmentation.auto_augment, augmentation.interpolation, size, mean)
    if augmentation.color_jitter:
        from torchvision.transforms import ColorJitter

        strength = augmentation.color_jitter
        jitter: Transform = ColorJitter(strength, strength, strength)
        return jitter
    return None


def _auto_augment(name: str, interpolation: str, size: Size, mean: tuple[float, ...]) -> Transform:
    from timm.data import auto_augment

    fill = tuple(min(255, round(255 * value)) for value in mean)
    # The keys are those of timm's training transform.
    hparams: dict[str, Any] = {
        "translate_const": int(min(size) * 0.45),
        "img_mean": fill[0] if len(fill) == 1 else fill,
    }
    hparams["interpolation"] = RESAMPLING[interpolation]
    transform: Transform
    try:
        if name.startswith("rand"):
            transform = auto_augment.rand_augment_transform(name, hparams)
        elif name.startswith("augmix"):
            transform = auto_augment.augment_and_mix_transform(name, {**hparams, "translate_pct": 0.3})
        else:
            transform = auto_augment.auto_augment_transform(name, hparams)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"auto_augment {name!r} is not a string that timm knows, such as 'rand-m9-mstd0.5-inc1'"
        ) from error
    return transform


def finish(
    samples: Sequence[Sample],
    sizes: Sequence[Size],
    augmentation: Augmentation,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> list[Tensor]:
    """Stack, normalise and erase views: one float32 (B, C, H, W) per size. Erasing seeds the global generators."""
    if augmentation.separate_aug:
        views = [to_batch([sample.pixels[place] for sample in samples]) for place in range(len(sizes))]
    else:
        largest = to_batch([sample.pixels[0] for sample in samples])
        smaller = [F.interpolate(largest, size, mode="bicubic", antialias=True).clamp_(0, 1) for size in sizes[1:]]
        views = [largest, *smaller]
    views = [normalize(view, mean, std) for view in views]
    if augmentation.erasing:
        from timm.data.random_erasing import RandomErasing

        erase: Callable[[Tensor], Tensor]
        erase = RandomErasing(augmentation.erasing, mode="pixel", device="cpu")  # type: ignore[no-untyped-call, unused-ignore]
        for row, sample in enumerate(samples):
            for view, seed in zip(views, sample.erasing_seeds, strict=True):
                seed_globals(seed)
                erase(view[row])
    return views


@dataclass(frozen=True)
class ImageViews:
    """Training views of classification images, for the loader; `mean` and `std` are those of the source."""

    augmentation: Augmentation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_pixels: int = MAX_PIXELS

    def augment(self, item: Item, sizes: Sequence[Size], rng: random.Random) -> Sample:
        return augment(item, sizes, self.augmentation, rng, self.mean, self.max_pixels)

    def collate(
        self, items: Sequence[Item], samples: Sequence[Sample], sizes: Sequence[Size]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return views (B, C, H_i, W_i), and the labels (B,) for each."""
        labels = torch.tensor([item.label for item in items])
        return finish(samples, sizes, self.augmentation, self.mean, self.std), [labels] * len(sizes)


def to_batch(pixels: Sequence[np.ndarray]) -> Tensor:
    """Stack uint8 images (H, W) or (H, W, 3) into a float32 batch (B, C, H, W) in [0, 1]."""
    stacked = torch.from_numpy(np.stack(pixels))
    stacked = stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)
    return stacked.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def normalize(batch: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalise each channel in place: subtract its mean and divide by its standard deviation."""
    shape = (1, -1, 1, 1)
    return batch.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))


def evaluation_views(
    item: Item,
    sizes: Sequence[Size | OwnSize],
    in_chans: int,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    max_pixels: int = MAX_PIXELS,
) -> tuple[list[np.ndarray], Size]:
    """Decode `item` once and make the published evaluation view at each size: uint8 (H, W) or (H, W, 3).

    Also returns the size of the original image. The image is resized to just cover the box (int(H/crop_pct),
    int(W/crop_pct)) with its aspect ratio kept, and the centre is cropped. For a square size s this is the published
    rule: short side to int(s/crop_pct), centre crop s. Only the crop is ever computed, so an image of 1 x 60,000 pixels
    costs no more than any other. At an `OwnSize` the whole image is shown. Raises BadImage.
    """
    with open_picture(item.data, item.name, in_chans, max_pixels) as picture:
        full = picture.size
        shown = [framed(full, size, crop_pct, item.name) for size in sizes]
        needed = max(max(shape[0] / (box[3] - box[1]), shape[1] / (box[2] - box[0])) for shape, box in shown)
        image = picture.decode(DRAFT_MARGIN * needed)
    return [np.asarray(_resize(image, shape, box, full, interpolation)) for shape, box in shown], full


@dataclass(frozen=True)
class ImageTest:
    """The published eval transform of classification images (see `evaluation_views`), for the loader.

    `size` is (H, W), an `OwnSize`, or a list of sizes; with a list, each image is decoded once and `inputs` is a list
    too.
    """

    size: Size | OwnSize | Sequence[Size]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if not self.sizes or any(not isinstance(pair, OwnSize) and min(pair) < 1 for pair in self.sizes):
            raise UserError(f"sizes {self.sizes} must be pairs (height, width) of positive integers")
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct {self.crop_pct} must be above 0 and at most 1")
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise UserError(f"mean {self.mean} and std {self.std} must have 1 or 3 values each, one for each channel")
        check_interpolation(self.interpolation)

    @property
    def single(self) -> bool:
        return isinstance(self.size, OwnSize) or (bool(self.size) and isinstance(self.size[0], int))

    @property
    def sizes(self) -> list[Size | OwnSize]:
        return [cast("Size | OwnSize", self.size)] if self.single else list(cast("Sequence[Size]", self.size))

    def prepare(self, item: Item) -> EvalSample:
        views, full = evaluation_views(
            item, self.sizes, len(self.mean), self.crop_pct, self.interpolation, self.max_pixels
        )
        return EvalSample(views, full)

    def shape(self, sample: EvalSample) -> Hashable:
        return tuple(view.shape for view in sample.pixels)

    def collate(self, items: Sequence[Item], samples: Sequence[EvalSample]) -> EvalBatch:
        pixels = zip(*(sample.pixels for sample in samples), strict=True)
        views = [normalize(to_batch(same), self.mean, self.std) for same in pixels]
        names, full = [item.name for item in items], [sample.full for sample in samples]
        inputs = views[0] if self.single else views
        return EvalBatch(inputs, labels_of(items), names, full, list(range(len(items))))


def framed(full: Size, size: Size | OwnSize, crop_pct: float, name: str) -> tuple[Size, Box]:
    """Return the input size of the image `name` of size `full`, and the box of it that is shown: its centre, or all."""
    if isinstance(size, OwnSize):
        return size.of(full, name), (0, 0, full[1], full[0])
    return size, centre_box(full[1], full[0], size, crop_pct)


def centre_box(width: int, height: int, size: Size, crop_pct: float) -> Box:
    """Return the box, in image pixels, that remains after resizing to cover the evaluation box and centre cropping."""
    box_height, box_width = int(size[0] / crop_pct), int(size[1] / crop_pct)
    if box_height * width >= box_width * height:
        new_height, new_width = box_height, box_height * width // height
    else:
        new_height, new_width = box_width * height // width, box_width
    # round() as in torchvision's centre crop: halves go to the even neighbour
    top, left = round((new_height - size[0]) / 2), round((new_width - size[1]) / 2)
    x, y = width / new_width, height / new_height
    return left * x, top * y, (left + size[1]) * x, (top + size[0]) * y
