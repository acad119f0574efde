"""Detection datasets in COCO's layout: a folder of images and one JSON file with all annotations."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anyres.data import rle
from anyres.data.base import Item
from anyres.data.objects import REPORT, DetectionSource, Objects, Segment, pixel_wide
from anyres.data.splits import TRAIN_NAMES, VALIDATION_NAMES, find_split
from anyres.errors import UserError
from anyres.io.parsing import read_text

logger = logging.getLogger(__name__)

Entry = dict[str, Any]

ROBOFLOW = "_annotations.coco.json"
FARTHEST = 10
"""Polygon coordinates may be at most this many times the image's long side."""
OTHER_HEADS = (
    "give annotations with them, or a head that needs none (retinanet, faster_rcnn and cascade_rcnn learn from boxes)"
)


class Coco(DetectionSource):
    """A COCO dataset: FOLDER/annotations/instances_train2017.json with FOLDER/train2017/*.jpg, and the same for val.

    The annotation file may also be called instances_SPLIT.json, SPLIT.json or *_SPLIT.json, and the images may be in
    FOLDER/SPLIT, FOLDER/images/SPLIT2017, FOLDER/images/SPLIT or FOLDER/images. With `keypoints`,
    person_keypoints_SPLIT2017.json is looked for first. In Roboflow's layout, FOLDER/SPLIT contains both the images and
    _annotations.coco.json. The other accepted split names are in `data.splits`. Classes are numbered in the order of
    their category ids, which may have gaps.

    Broken annotations are left out and counted in `report`. Listed images that do not exist are counted there too, but
    stay among the items so that reading them reports them as unreadable. Raises FileNotFoundError if the annotation
    file or all images are missing, and UserError if the annotation file is damaged or annotates images or categories
    that it does not list.
    """

    def __init__(
        self,
        folder: str,
        split: str,
        in_chans: int = 3,
        *,
        masks: bool = False,
        keypoints: bool = False,
        keep_empty: bool = False,
    ) -> None:
        if masks:
            rle.coco_masks()  # fail here rather than in a worker if the package is missing
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"there is no folder {folder!r}: give digits, or a folder in COCO's layout")
        path, called = _annotation_file(Path(folder), split, keypoints)
        images, categories, annotations = _read(path)
        super().__init__(f"{folder}/{split}", [category["name"] for category in categories], in_chans)
        self.category_ids = [category["id"] for category in categories]
        self.keypoint_names = _keypoint_names(path, categories) if keypoints else ()
        self.folder = _image_folder(Path(folder), called, images[0]["file_name"])
        self.report = dict.fromkeys(REPORT, 0)

        # Everything is stored in a few large arrays: a million small objects would be copied into every worker as soon
        # as they are touched (copy-on-write).
        self.ids = np.array([image["id"] for image in images], dtype=np.int64)
        self.sizes = np.array([(image["height"], image["width"]) for image in images], dtype=np.int64)
        self.files = np.array([os.fsencode(image["file_name"]) for image in images])
        if (self.sizes < 1).any():
            raise UserError(f"{path} has an image of height or width below 1: correct or remove it")

        owners = _places(path, "images", "image_id", self.ids.tolist(), annotations)
        labels = _places(path, "categories", "category_id", self.category_ids, annotations)
        boxes = np.array([_box(annotation) for annotation in annotations], dtype=np.float64).reshape(-1, 4)
        good = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] >= 0).all(axis=1)
        chosen = np.flatnonzero(good)[np.argsort(owners[good], kind="stable")]
        annotations = [annotations[place] for place in chosen]
        owners, boxes, self.labels = owners[chosen], boxes[chosen], labels[chosen]
        self.first = np.searchsorted(owners, np.arange(len(images) + 1))  # offsets of each image's objects
        self.crowd = np.array([bool(annotation.get("iscrowd")) for annotation in annotations], dtype=bool)
        areas = np.array([_number(annotation.get("area")) for annotation in annotations], dtype=np.float64)
        self.areas = np.where(areas >= 0, areas, boxes[:, 2] * boxes[:, 3])  # also replaces unusable (NaN) areas
        self.boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        sizes = self.sizes[owners]
        self.segments = _Segments(annotations, sizes.tolist(), self.report) if masks else None
        self.keypoints = self._keypoints(annotations) if keypoints else None

        wide = pixel_wide(self.boxes, sizes)
        usable = ~self.crowd & wide if self.segments is None else ~self.crowd & wide & self.segments.usable
        for part, there in (
            ("masks", usable.any()),
            ("keypoints", self.keypoints is None or (self.keypoints[usable, :, 2] > 0).any()),
        ):
            if split == "train" and (~self.crowd & wide).any() and not there:
                raise UserError(f"{path} marks objects, but no {part} that can be used: {OTHER_HEADS}")
        full = np.bincount(owners[usable], minlength=len(images)) > 0
        self.order = np.flatnonzero(full) if split == "train" and not keep_empty else np.arange(len(images))
        if len(self.order) == 0:
            raise UserError(f"{path} marks no object that can be trained: give other annotations, or keep_empty")
        self.report |= {
            "images": len(self.order),
            "objects": len(owners),
            "crowds": int(self.crowd.sum()),
            "empty_images": int((~full).sum()),
            "bad_boxes": int((~good).sum()),
            "thin_boxes": int((~wide & ~self.crowd).sum()),
            "maskless": 0 if self.segments is None else int((~self.segments.usable).sum()),
            "absent_images": self._count_absent(path),
        }

    def _count_absent(self, annotations: Path) -> int:
        """Count the listed images that do not exist; listing whole folders is fast even on remote file systems."""
        names = [os.path.split(os.fsdecode(file)) for file in self.files[self.order]]
        folders = {inside: self.folder / inside for inside, _ in names}
        there = {inside: set(os.listdir(folder)) if folder.is_dir() else () for inside, folder in folders.items()}
        absent = [os.path.join(inside, name) for inside, name in names if name not in there[inside]]
        if not absent:
            return 0
        found = (
            f"{len(absent)} of the {len(names)} images that {annotations} lists are not in {self.folder}, the first is"
            f" {absent[0]}"
        )
        if len(absent) == len(names):
            raise FileNotFoundError(f"{found}: put them there")
        logger.warning("%s: they count as unreadable", found)
        return len(absent)

    def _keypoints(self, annotations: Sequence[Entry]) -> np.ndarray:
        """Return the keypoints (m, K, 3) of all objects; zeros (not annotated) for objects without keypoints."""
        points = np.zeros((len(annotations), 3 * len(self.keypoint_names)))
        for place, annotation in enumerate(annotations):
            numbers = _numbers(annotation.get("keypoints") or [])
            if numbers is not None and len(numbers) == points.shape[1]:
                points[place] = numbers
            elif annotation.get("keypoints"):
                self.report["bad_keypoints"] += 1
        return points.reshape(len(annotations), -1, 3)

    def __len__(self) -> int:
        return len(self.order)

    def paths(self) -> Iterator[str]:
        return (os.path.join(self.folder, os.fsdecode(file)) for file in self.files[self.order])

    def _item(self, index: int) -> Item:
        image = self.order[index]
        inside = slice(self.first[image], self.first[image + 1])
        places = range(inside.start, inside.stop)
        objects = Objects(
            boxes=self.boxes[inside],
            labels=self.labels[inside],
            crowd=self.crowd[inside],
            areas=self.areas[inside],
            segments=None if self.segments is None else [self.segments[place] for place in places],
            keypoints=None if self.keypoints is None else self.keypoints[inside],
            image_id=int(self.ids[image]),
            size=(int(self.sizes[image, 0]), int(self.sizes[image, 1])),
        )
        file = os.fsdecode(self.files[image])
        return Item(file, self.folder / file, objects)


class _Segments:
    """The masks of m objects: all polygons in one array, plus run lengths for objects that have them."""

    def __init__(self, annotations: Sequence[Entry], sizes: Sequence[Sequence[int]], report: dict[str, int]) -> None:
        polygons: list[np.ndarray] = []
        owned = [0]  # running count of polygons after each object
        self.runs: dict[int, np.ndarray] = {}
        for place, (annotation, (height, width)) in enumerate(zip(annotations, sizes, strict=True)):
            segmentation = annotation.get("segmentation")
            if isinstance(segmentation, dict):
                try:
                    self.runs[place] = rle.read(segmentation, (height, width))
                except (TypeError, ValueError, OverflowError):
                    report["bad_runs"] += 1
            for polygon in segmentation if isinstance(segmentation, list) else ():
                numbers = _numbers(polygon)
                # Drawing needs memory in proportion to the length of the outline, even where it lies outside the image.
                reach = FARTHEST * max(height, width)
                if numbers is not None and len(numbers) >= 6 and len(numbers) % 2 == 0 and abs(numbers).max() <= reach:
                    polygons.append(numbers)
                else:
                    report["bad_polygons"] += 1
            owned.append(len(polygons))
        self.owned = np.array(owned)
        self.ends = np.cumsum([0, *map(len, polygons)])
        self.numbers = np.concatenate([np.zeros(0), *polygons])
        self.usable = np.diff(self.owned) > 0
        self.usable[list(self.runs)] = True

    def __getitem__(self, place: int) -> Segment:
        if not self.usable[place]:
            return None
        if place in self.runs:
            return self.runs[place]
        ends = self.ends[self.owned[place] : self.owned[place + 1] + 1]
        return np.split(self.numbers[ends[0] : ends[-1]], ends[1:-1] - ends[0])


def _annotation_file(folder: Path, split: str, keypoints: bool) -> tuple[Path, str]:
    """Return the annotation file of a split, and the name that the files use for the split."""
    kind = "person_keypoints" if keypoints else "instances"
    place = folder / "annotations"
    called = find_split((path.name for path in folder.iterdir() if path.is_dir()), split)
    if called is not None and (folder / called / ROBOFLOW).is_file():
        return folder / called / ROBOFLOW, called
    for name in TRAIN_NAMES if split == "train" else VALIDATION_NAMES:
        exact = [f"{kind}_{name}2017.json", f"{kind}_{name}.json", f"{name}.json"]
        files = [place / file for file in exact if (place / file).is_file()] or sorted(place.glob(f"*_{name}.json"))[:2]
        if len(files) > 1 and files[0].name not in exact:
            raise UserError(
                f"{place} has both {files[0].name} and {files[1].name}: rename the one to be used to {exact[1]}"
            )
        if files:
            return files[0], name
    name = f"{kind}_{split}2017.json"
    raise FileNotFoundError(
        f"there is no {place / name}: give digits, a folder with annotations/{name} (or {kind}_{split}.json, "
        f"{split}.json, *_{split}.json) and its images in {split}2017, {split} or images, or one with "
        f"{split}/{ROBOFLOW} beside the images"
    )


def _image_folder(folder: Path, split: str, first_file: str) -> Path:
    names = [f"{split}2017", split, f"images/{split}2017", f"images/{split}", "images"]
    for name in [*names, "."]:  # file names in the annotations may already include the folder
        if (folder / name / first_file).is_file():
            return folder / name
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise FileNotFoundError(f"{folder} has none of the folders {', '.join(names)}: put the images of {split} in one")


MAX_ANNOTATIONS = 4 << 30
"""Maximum size of an annotation file in bytes; COCO's training annotations take half a gigabyte."""


def _read(path: Path) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """Read the images, the categories sorted by id, and the annotations of a file."""
    text = read_text(path, MAX_ANNOTATIONS)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): copy or download it again") from error
    images = _entries(path, data, "images", {"id": int, "file_name": str, "height": int, "width": int})
    categories = _entries(path, data, "categories", {"id": int, "name": str})
    for part, key, entries in (
        ("images", "id", images),
        ("categories", "id", categories),
        ("categories", "name", categories),
    ):
        if not entries:
            raise UserError(f"{path} lists no {part}: give annotations in COCO's layout")
        if len({entry[key] for entry in entries}) < len(entries):
            raise UserError(f"{path} has two {part} of the same {key}: each needs its own")
    annotations = _entries(path, data, "annotations", {"image_id": int, "category_id": int})
    return images, sorted(categories, key=lambda category: category["id"]), annotations


def _entries(path: Path, data: Any, part: str, kinds: dict[str, type]) -> list[Entry]:
    entries = data.get(part) if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{path} has no list of {part}: give annotations in COCO's layout")
    for place, entry in enumerate(entries):
        for key, kind in kinds.items():
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, kind) or (isinstance(value, int) and abs(value) >= 2**63):
                what = "a text" if kind is str else "a whole number of at most 64 bits"
                raise UserError(
                    f"entry {place} of {part} in {path} has {key} {value!r}, which must be {what}: correct or remove it"
                )
    return entries


def _places(path: Path, part: str, key: str, ids: list[int], annotations: list[Entry]) -> np.ndarray:
    """Return, for each annotation, the index in `ids` of its image or category."""
    places = {number: place for place, number in enumerate(ids)}
    found = np.array([places.get(annotation[key], -1) for annotation in annotations], dtype=np.int64)
    if (found < 0).any():
        stray = annotations[int(np.argmin(found))]
        raise UserError(
            f"annotation {stray.get('id')} of {path} has {key} {stray[key]}, which is not among its {part}: remove it,"
            " or restore the file"
        )
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e9 else np.nan


def _box(annotation: Entry) -> list[float]:
    box = annotation.get("bbox")
    return [_number(value) for value in box] if isinstance(box, list) and len(box) == 4 else [np.nan] * 4


def _numbers(values: Any) -> np.ndarray | None:
    """Return a list of finite numbers as an array, or None for anything else."""
    try:
        numbers = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if numbers.ndim == 1 and np.isfinite(numbers).all() else None


def _keypoint_names(path: Path, categories: list[Entry]) -> tuple[str, ...]:
    names = next((category["keypoints"] for category in categories if category.get("keypoints")), None)
    if names is not None and not isinstance(names, list):
        raise UserError(f"{path} has a category with keypoints {names!r}, which must be a list of names: correct it")
    if names is None:
        raise UserError(f"no category of {path} names its keypoints: {OTHER_HEADS}")
    return tuple(map(str, names))
