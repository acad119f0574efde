"""Evaluation and prediction inputs: one sample per item, and batches of samples."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from anyres.data.base import Item
from anyres.data.decode import BadImage
from anyres.shapes import Size


class EvalSample(NamedTuple):
    """An item prepared for the network, not yet normalised."""

    pixels: Any
    """uint8 (h, w) or (h, w, 3), a list of these, or the views of a clip (views, T, h, w[, 3])."""
    full: Size
    """(height, width) of the original image."""
    truth: Any = None
    """Ground truth, if the item has any."""
    short: bool = False
    """True if the video was shorter than a clip."""


class EvalBatch(NamedTuple):
    """Samples that go through the network together."""

    inputs: Any
    """Input of the task's network: images (B, C, h, w) float32, padded images with their sizes, or clips."""
    truth: Any
    """Labels (B,), label maps (B, H, W), or a list of annotations per image; None if the items have no labels."""
    names: list[str]
    full: list[Size]
    """(height, width) of each original image."""
    rows: list[int]
    """The place of each sample among the items that were prepared together; from a loader, among those of its pass."""
    short: int = 0
    """Number of videos that were shorter than a clip."""


class EvalTransform(Protocol):
    """An eval transform: how items are prepared. An item's label may be None; then there is no ground truth."""

    def prepare(self, item: Item) -> EvalSample:
        """Decode and resize an item. Raises BadImage."""
        ...

    def shape(self, sample: EvalSample) -> Hashable:
        """Return what samples must have in common to share a batch, so that none changes the result of another."""
        ...

    def collate(self, items: Sequence[Item], samples: Sequence[EvalSample]) -> EvalBatch:
        """Normalise samples of the same `shape` and make a batch of them."""
        ...


def prepare_batches(transform: EvalTransform, items: Iterable[Item]) -> tuple[list[EvalBatch], dict[int, BadImage]]:
    """Prepare and collate items by shape; returns the batches, and the unreadable items as {index: error}."""
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
    batches = []
    for rows in by_shape([transform.shape(sample) for sample in samples]):
        batch = transform.collate([good[row] for row in rows], [samples[row] for row in rows])
        batches.append(batch._replace(rows=[places[row] for row in rows]))
    return batches, bad


def labels_of(items: Sequence[Item]) -> Tensor | None:
    """Return the class numbers (B,) int64 of the items, or None if any of them has no label."""
    return None if any(item.label is None for item in items) else torch.tensor([item.label for item in items])


def by_shape(shapes: Sequence[Hashable]) -> list[list[int]]:
    """Group row indices by shape, in order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for row, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(row)
    return list(groups.values())


def pixels_of(sample: EvalSample) -> np.ndarray:
    """Return the image that a sample shows, (h, w) or (h, w, 3); for a clip, the middle frame of its first view."""
    pixels = sample.pixels[0] if isinstance(sample.pixels, list) else sample.pixels
    if pixels.ndim > 3:
        frames = pixels[0]
        pixels = frames[len(frames) // 2]
    picture: np.ndarray = pixels
    return picture
