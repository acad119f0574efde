"""Detection annotations: the objects in an image, and the base class of detection sources."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from anyres.data.base import Item, MapSource
from anyres.shapes import Size

Segment = list[np.ndarray] | np.ndarray | None
"""An object's mask: polygons (x1, y1, x2, y2, … each), run lengths (see `rle`), or None if it is unusable."""


class Objects(NamedTuple):
    """The n annotated objects of an image, in pixels of the image as stored.

    Boxes and areas are float64, so that evaluation uses exactly the numbers of the annotation file.
    """

    boxes: np.ndarray  # (n, 4): x1, y1, x2, y2
    labels: np.ndarray  # (n,) int64, from 0
    crowd: np.ndarray  # (n,) bool: a region of many objects, ignored in evaluation and in training
    areas: np.ndarray  # (n,): of the masks if the dataset has them, whether or not they were loaded
    segments: list[Segment] | None  # None if not loaded
    keypoints: np.ndarray | None  # (n, K, 3): x, y, visibility (0 unlabelled, 1 hidden, 2 visible); None if not loaded
    image_id: int
    size: Size  # (height, width) of the image

    def trainable(self) -> np.ndarray:
        """Return (n,) bool: not a crowd, at least a pixel wide and tall inside the image, with a mask if masks are
        loaded."""
        usable = ~self.crowd & pixel_wide(self.boxes, np.array(self.size))
        if self.segments is not None:
            usable &= np.array([segment is not None for segment in self.segments], dtype=bool)
        return usable


def pixel_wide(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return (n,) bool: whether the part of each box (n, 4) inside its image is at least a pixel wide and tall.

    `sizes` are the image sizes, (2,) or (n, 2).
    """
    inside = np.clip(boxes, 0, sizes[..., [1, 0, 1, 0]])
    return np.all(inside[:, 2:] - inside[:, :2] >= 1, axis=1)


class DetectionSource(MapSource):
    """Base class of detection sources, whose items have an `Objects` as their label.

    `category_ids[label]` is the id of a class in annotation and result files. `keypoint_names` is empty unless
    keypoints were asked for. `report` has the counts of what was found, by the names in `REPORT`.
    """

    category_ids: list[int]
    keypoint_names: tuple[str, ...] = ()
    report: dict[str, int]

    @property
    def flip_pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs of keypoints to swap in a flipped image: those whose names differ only in left and right."""
        places = {name: place for place, name in enumerate(self.keypoint_names)}
        others = [(place, places.get(name.replace("left", "right"))) for name, place in places.items()]
        return tuple((place, other) for place, other in others if other is not None and other != place)

    def use_labels(self, label_names: Sequence[str]) -> None:
        """Renumber the labels as in `Source`. Classes that this source lacks get unused category ids."""
        known = dict(zip(self.label_names, self.category_ids, strict=True))
        spare = count(max(self.category_ids) + 1)
        super().use_labels(label_names)
        self.category_ids = [known[name] if name in known else next(spare) for name in label_names]

    def _marked(self, item: Item) -> Size:
        size: Size = item.label.size
        return size

    def _labelled(self, item: Item) -> Item:
        if self._relabel is None:
            return item
        labels = np.array([self._relabel[label] for label in item.label.labels.tolist()], dtype=np.int64)
        return item._replace(label=item.label._replace(labels=labels))


REPORT = {
    "images": "images to go through",
    "objects": "objects marked in them",
    "crowds": "crowd regions: ignored in evaluation, not trained",
    "empty_images": "images without an object to train",
    "bad_boxes": "objects whose box is not four finite numbers or has a negative side: left out",
    "thin_boxes": "objects that are less than a pixel wide or tall inside their image: not trained",
    "bad_polygons": "polygons of fewer than three points, or with coordinates not finite or far outside: left out",
    "bad_runs": "run-length masks that do not fit their image: left out",
    "bad_keypoints": "objects whose keypoints are not three finite numbers each: taken as not marked",
    "absent_images": "images that are listed and not there: unreadable",
    "maskless": "objects without a usable mask: not trained, ignored in mask evaluation",
}
"""Meaning of each count in a source's `report`."""

FAULTS = ("bad_boxes", "thin_boxes", "bad_polygons", "bad_runs", "bad_keypoints", "maskless")
"""The counts that indicate broken annotations."""
