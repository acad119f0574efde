"""Predictions for a single image or clip."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from anyres.data.base import Item
from anyres.data.config import DataConfig
from anyres.data.decode import load_image
from anyres.data.samples import EvalBatch
from anyres.tasks.finite import check_outputs

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Result(ABC):
    """The prediction for the item called `name`."""

    name: str

    @property
    def problem(self) -> str:
        """The reason why the item could not be read; empty if it could."""
        return ""

    @abstractmethod
    def values(self) -> list[list[Any]]:
        """Return the prediction as rows of values, in the columns of the task."""

    @abstractmethod
    def rows(self) -> list[list[str]]:
        """Return the same rows as text, with numbers rounded."""

    @abstractmethod
    def draw(self, item: Item) -> Image.Image:
        """Draw the prediction on the item."""


@dataclass(frozen=True)
class Unreadable(Result):
    """The result for an item that cannot be read."""

    reason: str

    @property
    def problem(self) -> str:
        return self.reason

    def values(self) -> list[list[Any]]:
        return []

    def rows(self) -> list[list[str]]:
        return []

    def draw(self, item: Item) -> Image.Image:
        raise TypeError(f"there is no prediction for {self.name}")


@dataclass(frozen=True)
class Classes(Result):
    """The most probable classes, in descending order."""

    labels: list[str]
    probabilities: list[float]

    def values(self) -> list[list[Any]]:
        return [[rank, *pair] for rank, pair in enumerate(zip(self.labels, self.probabilities, strict=True), 1)]

    def rows(self) -> list[list[str]]:
        return [[*map(str, row[:-1]), f"{row[-1]:.4f}"] for row in self.values()]

    def draw(self, item: Item) -> Image.Image:
        from anyres.tasks.drawing import draw_clip

        frames = np.asarray(load_image(item.data, item.name))[None]
        return draw_clip(frames, ["  ".join(row[1:]) for row in self.rows()])


@dataclass(frozen=True)
class Clip(Classes):
    """The most probable classes of a clip."""

    frames: np.ndarray
    """The frames as the network saw them: (T, h, w, 3) uint8."""

    def values(self) -> list[list[Any]]:
        return [row[1:] for row in super().values()]

    def draw(self, item: Item) -> Image.Image:
        from anyres.tasks.drawing import draw_clip

        return draw_clip(self.frames, ["  ".join(row) for row in self.rows()])


def likeliest(config: DataConfig, logits: Tensor, batch: EvalBatch, topk: int) -> list[tuple[list[str], list[float]]]:
    """Return the labels and probabilities of the `topk` most probable classes for each item, from logits (B, K).

    Raises UserError if the logits are not finite.
    """
    logits = logits.float()
    check_outputs(config.model, bool(logits.isfinite().all()), ", ".join(batch.names))
    values, indices = logits.softmax(-1).topk(min(topk, logits.shape[-1]))
    names = config.label_names
    labels: Any = [[names[i] if i < len(names) else str(i) for i in row] for row in indices.tolist()]
    return list(zip(labels, values.tolist(), strict=True))


@dataclass(frozen=True)
class Segments(Result):
    """The class of every pixel."""

    classes: np.ndarray
    """(H, W) class indices, at the size of the image."""
    names: list[str]

    def values(self) -> list[list[Any]]:
        present, counts = np.unique(self.classes, return_counts=True)
        order = np.argsort(-counts)
        return [[self.names[present[i]], float(counts[i] / self.classes.size)] for i in order]

    def rows(self) -> list[list[str]]:
        return [[name, f"{100 * share:.1f} %"] for name, share in self.values()]

    def draw(self, item: Item) -> Image.Image:
        from anyres.tasks.drawing import draw_segmentation

        return draw_segmentation(load_image(item.data, item.name), self.classes, self.names)


@dataclass(frozen=True)
class Detections(Result):
    """Objects by descending score; coordinates are in pixels of the image."""

    boxes: np.ndarray
    """(n, 4) x1, y1, x2, y2."""
    labels: list[int]
    scores: list[float]
    names: list[str]
    masks: np.ndarray | None = None
    """(n, H, W) bool."""
    keypoints: np.ndarray | None = None
    """(n, K, 3) x, y, 1."""

    def values(self) -> list[list[Any]]:
        found = zip(self.labels, self.scores, self.boxes.tolist(), strict=True)
        return [[self.names[label], float(score), *box] for label, score, box in found]

    def rows(self) -> list[list[str]]:
        return [[name, f"{score:.2f}", *(f"{value:.0f}" for value in box)] for name, score, *box in self.values()]

    def draw(self, item: Item) -> Image.Image:
        from anyres.tasks.drawing import draw_detections

        image = load_image(item.data, item.name)
        return draw_detections(image, self.boxes, self.labels, self.scores, self.names, self.masks, self.keypoints)
