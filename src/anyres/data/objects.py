"""Pictures with marked objects: what is known of each object, and what every source of such pictures has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from anyres.data.base import Item, MapSource
from anyres.shapes import Size

Segment = list[np.ndarray] | np.ndarray | None
"""An object's mask: polygons (x1, y1, x2, y2, … each), run lengths (see `rle`), or none that can be used."""


class Objects(NamedTuple):
    """The n objects marked in a picture, in its pixels and as they were stored.

    Boxes and areas are float64, so that evaluation computes with the very numbers of the annotation file.
    """

    boxes: np.ndarray  # (n, 4): x1, y1, x2, y2
    labels: np.ndarray  # (n,) int64, from 0
    crowd: np.ndarray  # (n,) bool: a region of many objects, ignored in evaluation and not trained
    areas: np.ndarray  # (n,): of the masks where the data has them, whether or not they were asked for
    segments: list[Segment] | None  # None: not asked for
    keypoints: np.ndarray | None  # (n, K, 3): x, y, visibility (0 not marked, 1 hidden, 2 visible); None: not asked for
    image_id: int
    size: Size  # (height, width) of the picture

    def trainable(self) -> np.ndarray:
        """(n,) bool: not a crowd, a pixel wide and tall inside the picture, with a mask where masks are asked for."""
        usable = ~self.crowd & pixel_wide(self.boxes, np.array(self.size))
        if self.segments is not None:
            usable &= np.array([segment is not None for segment in self.segments], dtype=bool)
        return usable


def pixel_wide(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(n,) bool: what of the boxes (n, 4) lies in pictures of `sizes`, (2,) or (n, 2), is a pixel wide and tall."""
    inside = np.clip(boxes, 0, sizes[..., [1, 0, 1, 0]])
    return np.all(inside[:, 2:] - inside[:, :2] >= 1, axis=1)


class DetectionSource(MapSource):
    """Pictures whose items' label is an `Objects`.

    `category_ids[label]` is the number of a class in the annotation file and in result files; `keypoint_names` is empty
    unless keypoints were asked for; `report` counts what was found, each count under a name of `REPORT`.
    """

    category_ids: list[int]
    keypoint_names: tuple[str, ...] = ()
    report: dict[str, int]

    @property
    def flip_pairs(self) -> tuple[tuple[int, int], ...]:
        """The keypoints that change places in a mirrored picture: those named alike but for left and right."""
        places = {name: place for place, name in enumerate(self.keypoint_names)}
        others = [(place, places.get(name.replace("left", "right"))) for name, place in places.items()]
        return tuple((place, other) for place, other in others if other is not None and other != place)

    def use_labels(self, label_names: Sequence[str]) -> None:
        """As for every source; classes that this source does not have get category ids that it does not use."""
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
"""What the counts of a source's `report` mean."""

FAULTS = ("bad_boxes", "thin_boxes", "bad_polygons", "bad_runs", "bad_keypoints", "maskless")
"""The counts that tell of broken annotations."""
