"""What evaluation and prediction make of items: one sample of each, then batches of samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from anyres.data.base import Item
from anyres.data.decode import BadImage
from anyres.shapes import Size


class EvalSample(NamedTuple):
    """An item as the network will see it, not normalised yet."""

    pixels: Any
    """uint8 (h, w) or (h, w, 3), a list of such, or the views of a clip (views, T, h, w[, 3])."""
    full: Size
    """(height, width) of the picture that it was made from."""
    truth: Any = None
    """What is marked in it, where the item was labelled."""
    short: bool = False
    """Whether the video was shorter than a clip."""


class EvalBatch(NamedTuple):
    """Samples that go through the network together."""

    inputs: Any
    """What the task's network takes: images (B, C, h, w) float32, padded images with their sizes, clips."""
    truth: Any
    """Labels (B,), maps of labels (B, H, W), or a list of what is marked in each picture; None without labels."""
    names: list[str]
    full: list[Size]
    """(height, width) of each picture before it was prepared."""
    rows: list[int]
    """The place of each among the items that were prepared together."""
    short: int = 0
    """How many of the videos were shorter than a clip."""


class EvalTransform(Protocol):
    """How items are prepared. Labels may be missing (None): then there is no truth."""

    def prepare(self, item: Item) -> EvalSample:
        """Decode and resize an item. Raises BadImage."""
        ...

    def collate(self, items: Sequence[Item], samples: Sequence[EvalSample]) -> list[EvalBatch]:
        """Normalise samples; those that can share a pass go into one batch."""
        ...


def prepare_batches(transform: EvalTransform, items: Iterable[Item]) -> tuple[list[EvalBatch], dict[int, BadImage]]:
    """Items that are prepared together → their batches, and by their places those that cannot be read."""
    places: list[int] = []
    good: list[Item] = []
    samples: list[EvalSample] = []
    bad: dict[int, BadImage] = {}
    for place, item in enumerate(items):
        try:
            samples.append(transform.prepare(item))
        except BadImage as error:
            bad[place] = error
        else:
            places.append(place)
            good.append(item)
    batches = transform.collate(good, samples) if good else []
    return [batch._replace(rows=[places[row] for row in batch.rows]) for batch in batches], bad


def labels_of(items: Sequence[Item]) -> Tensor | None:
    """Class numbers (B,) int64 of labelled items."""
    return None if any(item.label is None for item in items) else torch.tensor([item.label for item in items])


def by_shape(shapes: Sequence[Any]) -> list[list[int]]:
    """The rows of equal shapes together, in the order of the first of each."""
    groups: dict[Any, list[int]] = {}
    for row, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(row)
    return list(groups.values())


def pixels_of(sample: EvalSample) -> np.ndarray:
    """The picture that a sample shows: (h, w) or (h, w, 3), of a clip the middle frame of its first view."""
    pixels = sample.pixels[0] if isinstance(sample.pixels, list) else sample.pixels
    if pixels.ndim > 3:
        frames = pixels[0]
        pixels = frames[len(frames) // 2]
    picture: np.ndarray = pixels
    return picture
