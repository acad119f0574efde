"""Opening detection datasets, and the composed digits as one of them; COCO's layout is in `coco.py`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import numpy as np

from anyres.data import rle
from anyres.data.base import Item
from anyres.data.coco import Coco
from anyres.data.composed import KEYPOINT_NAMES, Scenes
from anyres.data.objects import FAULTS, REPORT, DetectionSource, Objects
from anyres.errors import UserError

logger = logging.getLogger(__name__)


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
    """Open a detection dataset for `split` "train" or "val".

    `spec` is one of

    - "digits": scenes composed of handwritten digits, drawn on demand: 10 classes, masks and 4 keypoints;
    - a folder in COCO's layout: see `Coco`.

    `masks` and `keypoints` load those in addition to boxes. "train" leaves out images without a trainable object unless
    `keep_empty`; "val" keeps every image. `in_chans` 1 loads grey images. `label_names` numbers the classes by a given
    list, such as a checkpoint's.

    Broken annotations are counted in the log. Raises UserError or FileNotFoundError with a message that says what is
    missing.
    """
    if split not in ("train", "val"):
        raise UserError(f"split {split!r} must be 'train' or 'val'")
    source: DetectionSource
    if os.fspath(spec) == "digits":
        source = DigitScenes(split, in_chans or 3, masks=masks, keypoints=keypoints)
    else:
        source = Coco(os.fspath(spec), split, in_chans or 3, masks=masks, keypoints=keypoints, keep_empty=keep_empty)
    if label_names is not None and list(label_names) != source.label_names:
        source.use_labels(label_names)
    faults = [f"{REPORT[name]} ({source.report[name]})" for name in FAULTS if source.report.get(name)]
    if faults:
        logger.warning("there are in the annotations of %s %s", source.name, "; ".join(faults))
    return source


class DigitScenes(DetectionSource):
    """The composed digits (see `composed`) as a detection dataset; `side` is the longer side of a scene in pixels."""

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
