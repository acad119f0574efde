"""Train and eval transforms of videos."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyres.data.base import Item
from anyres.data.clips import Sampling, Video
from anyres.data.decode import MAX_PIXELS, load_image
from anyres.data.fitting import OwnSize
from anyres.data.samples import EvalBatch, EvalSample, labels_of
from anyres.data.views import (
    Augmentation,
    Box,
    Sample,
    _resize,
    augment,
    centre_box,
    check_interpolation,
    finish,
    framed,
    normalize,
    to_batch,
)
from anyres.errors import UserError
from anyres.shapes import Size


@dataclass(frozen=True)
class ClipViews:
    """Training clips of videos, for the loader.

    One clip is drawn from each video and shown at every size. Its frames are augmented like images, all with the same
    random draws: one crop, flip, RandAugment and random-erasing box per clip. Each size has its own draws, unless
    `augmentation.separate_aug` is off.
    """

    augmentation: Augmentation
    sampling: Sampling
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_pixels: int = MAX_PIXELS

    def augment(self, item: Item, sizes: Sequence[Size], rng: random.Random) -> list[Sample]:
        """Return the views of every frame."""
        video = Video(item.data, item.name, self.max_pixels)
        frames = video.read(self.sampling.train(video.frames, video.fps, rng))
        draws = rng.getstate()
        samples = []
        for frame in frames:
            rng.setstate(draws)
            still = item._replace(data=frame)
            samples.append(augment(still, sizes, self.augmentation, rng, self.mean, self.max_pixels))
        return samples

    def collate(
        self, items: Sequence[Item], samples: Sequence[list[Sample]], sizes: Sequence[Size]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return views (B, C, T, H_i, W_i) float32, and the labels (B,) for each."""
        stills = finish([frame for clip in samples for frame in clip], sizes, self.augmentation, self.mean, self.std)
        labels = torch.tensor([item.label for item in items])
        return [as_clips(view, len(items)) for view in stills], [labels] * len(sizes)


def as_clips(frames: Tensor, count: int) -> Tensor:
    """Reshape frames (B·T, C, H, W) of `count` = B clips to (B, C, T, H, W).

    The result is a view, so models that process frames separately get them back without a copy.
    """
    return frames.unflatten(0, (count, -1)).transpose(1, 2)


class Clips(NamedTuple):
    """The views of videos, (B, views, T, H, W[, 3]) uint8, with their normalisation."""

    pixels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def views(self) -> Iterator[Tensor]:
        """Yield one normalised view at a time, as models take it: (B, C, T, H, W) float32."""
        for pixels in self.pixels.unbind(1):
            frames = normalize(to_batch(pixels.flatten(0, 1).numpy()), self.mean, self.std)  # type: ignore[arg-type]
            yield as_clips(frames, len(pixels))


@dataclass(frozen=True)
class ClipTest:
    """The published evaluation of videos, for the loader: `clips` times `crops` views at `size` (height, width).

    Clips are spread evenly over the video (see `Sampling.test`). Frames are resized to just cover the box (int(H /
    `crop_pct`), int(W / `crop_pct`)); for a square size, the short side becomes int(size / crop_pct). `crops` is 1 for
    the centre crop, or 3 for the two ends and the middle of the longer direction. An `OwnSize` shows whole frames.
    Raises UserError for other numbers of crops.
    """

    size: Size | OwnSize
    sampling: Sampling
    mean: tuple[float, ...]
    std: tuple[float, ...]
    clips: int = 1
    crops: int = 1
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if not isinstance(self.size, OwnSize) and min(self.size) < 1:
            raise UserError(f"size {self.size} must be a pair (height, width) of positive integers")
        if self.crops not in (1, 3):
            raise UserError(f"crops {self.crops} must be 1 (centre) or 3 (along the long side)")
        if self.crops > 1 and isinstance(self.size, OwnSize):
            raise UserError(f"crops {self.crops} are parts of a frame, and size native and original show all of it")
        if self.clips < 1 or (self.clips > 1 and self.sampling.segments):
            raise UserError(f"clips {self.clips} must be at least 1, and 1 where a clip is one frame of each segment")
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct {self.crop_pct} must be above 0 and at most 1")
        check_interpolation(self.interpolation)

    def prepare(self, item: Item) -> EvalSample:
        video = Video(item.data, item.name, self.max_pixels)
        clips = [self.sampling.test(video.frames, video.fps, clip, self.clips) for clip in range(self.clips)]
        wanted = sorted({index for clip in clips for index in clip})
        stills = {
            index: load_image(frame, item.name, len(self.mean), max_pixels=self.max_pixels)
            for index, frame in zip(wanted, video.read(wanted), strict=True)
        }
        width, height = next(iter(stills.values())).size
        shape, shown = framed((height, width), self.size, self.crop_pct, item.name)
        own = isinstance(self.size, OwnSize)
        boxes = [shown] if own else crop_boxes(width, height, shape, self.crop_pct, self.crops)
        made = {
            index: [np.asarray(_resize(still, shape, box, (height, width), self.interpolation)) for box in boxes]
            for index, still in stills.items()
        }
        views = [np.stack([made[index][crop] for index in clip]) for clip in clips for crop in range(self.crops)]
        short = video.frames < int(self.sampling.span(video.fps))
        return EvalSample(np.stack(views), (height, width), short=short)

    def shape(self, sample: EvalSample) -> Hashable:
        return sample.pixels.shape

    def collate(self, items: Sequence[Item], samples: Sequence[EvalSample]) -> EvalBatch:
        """Return a batch whose `inputs` are `Clips`, which are normalised one view at a time when they are used."""
        clips = Clips(torch.from_numpy(np.stack([sample.pixels for sample in samples])), self.mean, self.std)
        names, full = [item.name for item in items], [sample.full for sample in samples]
        short = sum(sample.short for sample in samples)
        return EvalBatch(clips, labels_of(items), names, full, list(range(len(items))), short)


def crop_boxes(width: int, height: int, size: Size, crop_pct: float, crops: int) -> list[Box]:
    """Return the boxes, in frame pixels, that `crops` views show: the centre, or centre and both ends of the longer
    side."""
    left, top, right, bottom = centre = centre_box(width, height, size, crop_pct)
    if crops == 1:
        return [centre]
    if width - (right - left) >= height - (bottom - top):
        return [(0, top, right - left, bottom), centre, (width - (right - left), top, width, bottom)]
    return [(left, 0, right, bottom - top), centre, (left, height - (bottom - top), right, height)]
