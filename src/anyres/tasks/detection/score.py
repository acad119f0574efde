"""COCO's average precision of boxes, masks and keypoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyres.data import rle
from anyres.data.config import DataConfig
from anyres.data.objects import DetectionSource, Objects
from anyres.data.samples import EvalBatch
from anyres.errors import UserError
from anyres.io.files import atomic_write, check_file
from anyres.shapes import Size
from anyres.tasks.detection.network import Found, at_full_size
from anyres.tasks.finite import check_found
from anyres.tasks.scores import Measured, Metric, covered

Entry = dict[str, Any]
"""An annotation, or a detection in COCO's results format."""

DETECTIONS = 100
"""Number of detections per image that count, by descending score."""
KINDS = {"bbox": "", "segm": "mask_", "keypoints": "keypoint_"}
"""COCO's evaluation types → prefixes of the names of their scores."""
SCORES = {
    "ap": "AP_all",
    "ap50": "AP_50",
    "ap75": "AP_75",
    "ap_small": "AP_small",
    "ap_medium": "AP_medium",
    "ap_large": "AP_large",
}
COCO_KEYPOINTS = (
    "nose",
    *(f"{side}_{part}" for part in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
      for side in ("left", "right")),
)  # fmt: skip
"""Keypoints of COCO's persons, in the order of COCO's sigmas, which are the default of its code."""
SIGMA = 0.05
"""Sigma of all other keypoints, relative to the size of the object."""


class AveragePrecision(Metric):
    """COCO's scores in percent: "ap", "ap50", "ap75", "ap_small", "ap_medium" and "ap_large".

    If the model predicts masks or keypoints and the source was opened with them, there are also scores with the
    prefixes "mask_" and "keypoint_". Scores without any object to evaluate (for instance no small ones) are left out.
    Everything is evaluated in pixels of the original image. Keypoints other than `COCO_KEYPOINTS`, by name and order,
    all use the sigma `SIGMA`, and the note says so.

    Args:
        results: file to write all detections to, in COCO's results format.
    """

    def __init__(self, config: DataConfig, source: DetectionSource, results: str | Path | None = None) -> None:
        rle.coco_masks()  # report a missing package now rather than after the last image
        if results is not None:
            check_file(results, "detections")
        self.model, self.source, self.results = config.model, source, results
        self.categories = dict(zip(config.places(source).tolist(), source.category_ids, strict=True))
        """Category id in the source of each of the model's labels, as far as the source has them."""
        self.images: list[Entry] = []
        self.truth: list[Entry] = []
        self.found: list[Entry] = []
        self.kinds = {"bbox"}

    def update(self, outputs: Found, batch: EvalBatch) -> None:
        marked = batch.truth
        check_found(
            self.model, outputs.objects, outputs.finite, f"the images {[objects.image_id for objects in marked]}"
        )
        for output, objects, seen in zip(outputs.objects, marked, outputs.seen, strict=True):
            self.images.append({"id": objects.image_id, "height": objects.size[0], "width": objects.size[1]})
            self.truth += _truth(objects, self.source.category_ids)
            self.found += _detections(output, objects, seen, self.categories)
            self.kinds |= {"segm"} if "masks" in output and objects.segments is not None else set()
            self.kinds |= {"keypoints"} if "keypoints" in output and objects.keypoints is not None else set()

    def share(self) -> Any:
        return self.images, self.truth, self.found, self.kinds

    def compute(self, shares: list[Any], count: int) -> Measured:
        images, truth, found = ([entry for share in shares for entry in share[column]] for column in range(3))
        if all(entry["iscrowd"] for entry in truth):
            raise UserError(f"the images of {self.source.name} have no annotated objects: evaluate on other data")
        if self.results is not None:
            with atomic_write(self.results, "detections") as temporary:
                temporary.write_text(json.dumps(found), encoding="utf-8")
        kinds = set().union(*(share[3] for share in shares))
        scores: dict[str, float] = {}
        for kind, prefix in KINDS.items():
            if kind in kinds:
                names = self.source.keypoint_names
                part = average_precision(images, self.source.category_ids, truth, found, kind, names)
                scores |= {prefix + name: score for name, score in part.items()}
        if "ap" not in scores:
            raise UserError(f"no object of {self.source.name} has an area that COCO counts: check the areas and boxes")
        marked_classes = len({entry["category_id"] for entry in truth if not entry["iscrowd"]})
        notes = [covered("AP", marked_classes, len(self.source.category_ids), "the others have no annotated objects")]
        if "keypoints" in kinds and not are_cocos(self.source.keypoint_names):
            notes.append(
                f"keypoint AP uses the sigma {SIGMA} for every keypoint, because their names are not those of COCO"
            )
        return Measured(scores, count, note="; ".join(filter(None, notes)))


def are_cocos(keypoint_names: Sequence[str]) -> bool:
    """Return whether the keypoints are those of COCO's persons, in order, up to case and "-" or " " for "_"."""
    return tuple(name.lower().replace("-", "_").replace(" ", "_") for name in keypoint_names) == COCO_KEYPOINTS


def average_precision(
    images: Sequence[Entry],
    category_ids: Sequence[int],
    truth: Sequence[Entry],
    found: Sequence[Entry],
    kind: str,
    keypoint_names: Sequence[str] = (),
) -> dict[str, float]:
    """Return the scores of `SCORES` in percent, without those that have no object to evaluate.

    The numbers equal those of COCO's own code.

    Args:
        images: with id, height and width.
        truth: COCO's annotations, without ids.
        found: COCO's results, without ids; for the `kind` "segm" with "segmentation", for "keypoints" with "keypoints".
        kind: one of `KINDS`.
        keypoint_names: names that determine the sigmas of the keypoints.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    def silent(*_: Any) -> None: ...

    def dataset(entries: Sequence[Entry]) -> Any:
        numbered = [{**entry, "id": number} for number, entry in enumerate(entries, start=1)]
        categories = [{"id": number, "name": str(number)} for number in category_ids]
        return COCO({"images": list(images), "categories": categories, "annotations": numbered}, print_function=silent)

    if kind == "segm":  # a region without a usable mask is ignored
        truth = [{**entry, "iscrowd": 1} if entry.get("maskless") else entry for entry in truth]
    found = [{**entry, "iscrowd": 0, "area": _area(entry, kind)} for entry in found]
    count = max((len(entry.get("keypoints", ())) // 3 for entry in truth), default=0)
    sigmas = None if kind != "keypoints" or are_cocos(keypoint_names) else [SIGMA] * count
    judge = COCOeval_faster(dataset(truth), dataset(found), kind, print_function=silent, kpt_oks_sigmas=sigmas)
    judge.run()
    values = judge.stats_as_dict
    return {name: 100 * values[theirs] for name, theirs in SCORES.items() if values.get(theirs, -1) >= 0}


def _area(entry: Entry, kind: str) -> float:
    """Return the area that determines whether a detection is small, medium or large."""
    if kind == "segm":
        return float(rle.coco_masks().area(entry["segmentation"]))
    if kind == "keypoints":
        x, y = entry["keypoints"][0::3], entry["keypoints"][1::3]
        return float((max(x) - min(x)) * (max(y) - min(y)))
    return float(entry["bbox"][2] * entry["bbox"][3])


def _truth(objects: Objects, category_ids: Sequence[int]) -> list[Entry]:
    """Convert objects to COCO's annotations; those without a usable mask are "maskless" and have their box instead."""
    entries: list[Entry] = []
    for place, (x1, y1, x2, y2) in enumerate(objects.boxes.tolist()):
        entry: Entry = {
            "image_id": objects.image_id,
            "category_id": category_ids[objects.labels[place]],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": float(objects.areas[place]),
            "iscrowd": int(objects.crowd[place]),
        }
        if objects.segments is not None:
            segment = objects.segments[place]
            if segment is None:
                entry |= {"maskless": True, "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]]}
            elif isinstance(segment, np.ndarray):
                entry["segmentation"] = {"size": list(objects.size), "counts": segment.tolist()}
            else:
                entry["segmentation"] = [polygon.tolist() for polygon in segment]
        if objects.keypoints is not None:
            points = objects.keypoints[place]
            entry |= {"keypoints": points.ravel().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}
        entries.append(entry)
    return entries


def _detections(output: dict[str, Tensor], objects: Objects, seen: Size, categories: dict[int, int]) -> list[Entry]:
    """Convert the detections in an image seen at size `seen` to COCO's results, in pixels of the original image."""
    known = torch.tensor([label in categories for label in output["labels"].tolist()], dtype=torch.bool)
    kept = torch.where(known.to(output["labels"].device))[0]
    kept = kept[output["scores"][kept].argsort(descending=True, stable=True)[:DETECTIONS]]
    wanted = {"masks": objects.segments, "keypoints": objects.keypoints}
    chosen = {name: values[kept] for name, values in output.items() if wanted.get(name, ()) is not None}
    found = at_full_size(chosen, seen, objects.size)
    entries: list[Entry] = [
        {
            "image_id": objects.image_id,
            "category_id": categories[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for label, score, (x1, y1, x2, y2) in zip(
            found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True
        )
    ]
    if "masks" in found:
        for entry, mask in zip(entries, _encode(found["masks"]), strict=True):
            entry["segmentation"] = mask
    if "keypoints" in found:
        for entry, flat in zip(entries, found["keypoints"].flatten(1).tolist(), strict=True):
            entry["keypoints"] = flat
    return entries


def _encode(masks: Tensor) -> list[Entry]:
    """Encode masks (n, H, W) as COCO's compressed run lengths, which are in column-major order."""
    columns = masks.transpose(1, 2).contiguous().to("cpu", torch.uint8).numpy()
    coded = rle.coco_masks().encode(columns.transpose(2, 1, 0)) if len(masks) else []
    return [{"size": list(code["size"]), "counts": code["counts"].decode("ascii")} for code in coded]
