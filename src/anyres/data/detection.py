"""Pictures with marked objects: what is known of each object, and the sources that hold such pictures."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from anyres.data import rle
from anyres.data.composed import KEYPOINT_NAMES, Scenes
from anyres.data.schedule import Size
from anyres.data.sources import Item, MapSource
from anyres.errors import UserError

logger = logging.getLogger(__name__)

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


def open_detection(
    spec: str | os.PathLike[str],
    split: str = "train",
    *,
    masks: bool = False,
    keypoints: bool = False,
    keep_empty: bool = False,
    in_chans: int | None = None,
    label_names: Sequence[str] | None = None,
) -> DetectionSource:
    """Open pictures with marked objects for `split` "train" or "val".

    `spec` is one of

    - "digits": scenes composed of handwritten digits, drawn as they are read: 10 classes, masks, 4 keypoints;
    - a folder in COCO's layout: see `Coco`.

    `masks` and `keypoints` ask for those besides the boxes. "train" leaves out images without an object to train unless
    `keep_empty`; "val" keeps every image. `in_chans` 1 asks for grey images. `label_names` numbers the classes by a
    given list, such as a checkpoint's.

    Broken annotations are counted in the log. Raises UserError or FileNotFoundError with a sentence on what is missing.
    """
    if split not in ("train", "val"):
        raise UserError(f"split {split!r} must be 'train' or 'val'")
    source: DetectionSource
    if os.fspath(spec) == "digits":
        source = DigitScenes(split, in_chans or 3, masks=masks, keypoints=keypoints)
    else:
        from anyres.data.coco import Coco

        source = Coco(os.fspath(spec), split, in_chans or 3, masks=masks, keypoints=keypoints, keep_empty=keep_empty)
    if label_names is not None and list(label_names) != source.label_names:
        source.use_labels(label_names)
    faults = [f"{REPORT[name]} ({source.report[name]})" for name in FAULTS if source.report.get(name)]
    if faults:
        logger.warning("there are in the annotations of %s %s", source.name, "; ".join(faults))
    return source


class DigitScenes(DetectionSource):
    """The composed digits (see `composed`) as a source of objects; `side` is their longer side in pixels."""

    def __init__(
        self, split: str, in_chans: int = 3, *, masks: bool = False, keypoints: bool = False, side: int = 128
    ) -> None:
        super().__init__(f"digits/{split}", [str(digit) for digit in range(10)], in_chans)
        self.scenes = Scenes(split, side)
        self.masks = masks
        self.category_ids = list(range(1, 11))
        self.keypoint_names = KEYPOINT_NAMES if keypoints else ()
        self.report = {"images": len(self.scenes)}

    def __len__(self) -> int:
        return len(self.scenes)

    def _item(self, index: int) -> Item:
        scene = self.scenes.scene(index)
        objects = Objects(
            boxes=scene.boxes.astype(np.float64),
            labels=scene.labels,
            crowd=np.zeros(len(scene.labels), dtype=bool),
            areas=scene.masks.sum((1, 2), dtype=np.float64),
            segments=[rle.encode(mask) for mask in scene.masks] if self.masks else None,
            keypoints=scene.keypoints.astype(np.float64) if self.keypoint_names else None,
            image_id=index + 1,
            size=(scene.image.shape[0], scene.image.shape[1]),
        )
        return Item(f"{self.name}/{index:04d}", scene.image, objects)
