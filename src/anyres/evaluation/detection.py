"""COCO's average precision of a detector: boxes, masks and keypoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anyres.data import EvalLoader, rle
from anyres.data.detection import DetectionSource, Objects
from anyres.data.detection_views import LONGEST, DetectionTest
from anyres.errors import UserError
from anyres.evaluation.accuracy import _gather, process
from anyres.evaluation.cost import precision_context
from anyres.evaluation.results import Measured, Size, covered
from anyres.inference.finite import check_found, check_weights, layers_watched
from anyres.inference.preparation import check_size, label_places, preparation_for
from anyres.io.files import atomic_write, check_file
from anyres.tasks.detection import paste_masks

Entry = dict[str, Any]
"""An annotation, or a detection in the layout of COCO's result files."""

DETECTIONS = 100
"""Of each image, the best by their scores; what is beyond does not count."""
KINDS = {"bbox": "", "segm": "mask_", "keypoints": "keypoint_"}
"""What can be scored, by COCO's names, and how the names of the scores begin."""
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
"""Those of COCO's persons, in the order of its spreads, which are its own code's default."""
SIGMA = 0.05
"""The spread of every other keypoint, relative to the object's size."""


def evaluate_detection(
    model: nn.Module,
    source: DetectionSource,
    size: Size,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    *,
    workers: int = 0,
    longest: float = LONGEST,
    results: str | Path | None = None,
) -> Measured:
    """Detect the objects in every picture of `source`, scaled by `fit`, and score them as COCO does, in percent: "ap",
    "ap50", "ap75", "ap_small", "ap_medium" and "ap_large", and the same with "mask_" and "keypoint_" before them if
    the model gives masks or keypoints and the source was asked for them.

    A score without any object to judge it by (small ones, for instance) is left out. Everything is judged in the pixels
    of the original picture. Keypoints that are not `COCO_KEYPOINTS`, by name and order, all have the spread `SIGMA`,
    and the note says so. `results` is a file to write all detections to, in COCO's layout. Under torch.distributed
    every process takes its own share of the pictures and all return the same scores.

    Raises UserError when no picture is readable, no object is marked, the classes do not fit the model's, weights or
    outputs (also those of the head's layers) are not finite, or the size is below the model's minimum.
    """
    rle.coco_masks()  # it complains now, not after the last picture
    check_size(model, size)
    device = torch.device(device)
    rank, world = process()
    if results is not None and rank == 0:
        check_file(results, "detections")
    way = preparation_for(model, source)
    categories = _categories(model, source)
    test = DetectionTest(size, way.mean, way.std, longest)
    loader = EvalLoader(source, test, batch_size, workers, rank=rank, world=world)
    check_weights(model)
    was_training = model.training
    model = model.to(device).eval()
    images: list[Entry] = []
    truth: list[Entry] = []
    found: list[Entry] = []
    kinds = {"bbox"}
    try:
        with torch.inference_mode():
            for view, marked in loader:
                with precision_context(precision, device), layers_watched(getattr(model, "head", model)) as finite:
                    outputs = model(view.images.to(device, non_blocking=True), view.sizes)
                check_found(model, outputs, finite, f"the images {[objects.image_id for objects in marked]}")
                for output, objects, seen in zip(outputs, marked, view.sizes, strict=True):
                    images.append({"id": objects.image_id, "height": objects.size[0], "width": objects.size[1]})
                    truth += _truth(objects, source.category_ids)
                    found += _detections(output, objects, seen, categories)
                    kinds |= {"segm"} if "masks" in output and objects.segments is not None else set()
                    kinds |= {"keypoints"} if "keypoints" in output and objects.keypoints is not None else set()
    finally:
        model.train(was_training)
    shares = _gather((images, truth, found, kinds, tuple(str(image) for image in loader.bad)))
    images, truth, found = ([entry for share in shares for entry in share[column]] for column in range(3))
    kinds = set().union(*(share[3] for share in shares))
    bad = tuple(name for share in shares for name in share[4])
    if not images:
        raise UserError(f"{source.name} has no readable image ({len(bad)} skipped): check the files")
    if all(entry["iscrowd"] for entry in truth):
        raise UserError(f"no object is marked in the images of {source.name}: give others to evaluate on")
    scores: dict[str, float] = {}
    if rank == 0:
        if results is not None:
            with atomic_write(results, "detections") as temporary:
                temporary.write_text(json.dumps(found), encoding="utf-8")
        for kind, prefix in KINDS.items():
            if kind in kinds:
                part = average_precision(images, source.category_ids, truth, found, kind, source.keypoint_names)
                scores |= {prefix + name: score for name, score in part.items()}
    scores = _gather((scores,))[0][0]
    if "ap" not in scores:
        raise UserError(f"no object of {source.name} has an area that COCO judges: check the areas and boxes")
    marked_classes = len({entry["category_id"] for entry in truth if not entry["iscrowd"]})
    notes = [covered("AP", marked_classes, len(source.category_ids), "no object of the others is marked")]
    if "keypoints" in kinds and not are_cocos(source.keypoint_names):
        notes.append(f"keypoint AP takes {SIGMA} for the spread of every keypoint: their names are not those of COCO")
    return Measured(scores, len(images), bad, "; ".join(filter(None, notes)))


def are_cocos(keypoint_names: Sequence[str]) -> bool:
    """Whether keypoints are those of COCO's persons, in their order; case, "-" and blanks are no difference."""
    return tuple(name.lower().replace("-", "_").replace(" ", "_") for name in keypoint_names) == COCO_KEYPOINTS


def average_precision(
    images: Sequence[Entry],
    category_ids: Sequence[int],
    truth: Sequence[Entry],
    found: Sequence[Entry],
    kind: str,
    keypoint_names: Sequence[str] = (),
) -> dict[str, float]:
    """The scores of `SCORES` in percent, without those that have no object to judge them by.

    `images` have id, height and width. `truth` are COCO's annotations and `found` its results, without ids; results
    have a "segmentation" for the `kind` "segm" and "keypoints" for that one; `keypoint_names` decide
    what spread they have. The numbers are those of COCO's own code.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    def silent(*_: Any) -> None: ...

    def dataset(entries: Sequence[Entry]) -> Any:
        numbered = [{**entry, "id": number} for number, entry in enumerate(entries, start=1)]
        categories = [{"id": number, "name": str(number)} for number in category_ids]
        return COCO({"images": list(images), "categories": categories, "annotations": numbered}, print_function=silent)

    if kind == "segm":  # a region without a usable mask neither counts nor hurts
        truth = [{**entry, "iscrowd": 1} if entry.get("maskless") else entry for entry in truth]
    found = [{**entry, "iscrowd": 0, "area": _area(entry, kind)} for entry in found]
    count = max((len(entry.get("keypoints", ())) // 3 for entry in truth), default=0)
    sigmas = None if kind != "keypoints" or are_cocos(keypoint_names) else [SIGMA] * count
    judge = COCOeval_faster(dataset(truth), dataset(found), kind, print_function=silent, kpt_oks_sigmas=sigmas)
    judge.run()
    values = judge.stats_as_dict
    return {name: 100 * values[theirs] for name, theirs in SCORES.items() if values.get(theirs, -1) >= 0}


def _area(entry: Entry, kind: str) -> float:
    """What decides whether a detection is small, medium or large."""
    if kind == "segm":
        return float(rle.coco_masks().area(entry["segmentation"]))
    if kind == "keypoints":
        x, y = entry["keypoints"][0::3], entry["keypoints"][1::3]
        return float((max(x) - min(x)) * (max(y) - min(y)))
    return float(entry["bbox"][2] * entry["bbox"][3])


def _categories(model: nn.Module, source: DetectionSource) -> dict[int, int]:
    """The category id of each of the model's labels that the source has."""
    return dict(zip(label_places(model, source).tolist(), source.category_ids, strict=True))


def _truth(objects: Objects, category_ids: Sequence[int]) -> list[Entry]:
    """The objects as COCO's annotations; those without a usable mask are "maskless", with their box as a stand-in."""
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
    """What the model found in a picture that it saw at size `seen`, in the picture's own pixels."""
    scale = torch.tensor([objects.size[1] / seen[1], objects.size[0] / seen[0]], device=output["boxes"].device)
    known = torch.tensor([label in categories for label in output["labels"].tolist()], dtype=torch.bool)
    kept = torch.where(known.to(output["labels"].device))[0]
    kept = kept[output["scores"][kept].argsort(descending=True, stable=True)[:DETECTIONS]]
    boxes = output["boxes"][kept].float() * scale.repeat(2)
    entries: list[Entry] = [
        {
            "image_id": objects.image_id,
            "category_id": categories[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for label, score, (x1, y1, x2, y2) in zip(
            output["labels"][kept].tolist(), output["scores"][kept].tolist(), boxes.tolist(), strict=True
        )
    ]
    if "masks" in output and objects.segments is not None:
        for entry, mask in zip(entries, _encode(paste_masks(output["masks"][kept], boxes, objects.size)), strict=True):
            entry["segmentation"] = mask
    if "keypoints" in output and objects.keypoints is not None:
        points = output["keypoints"][kept].float()
        points = torch.cat([points[..., :2] * scale, points[..., 2:]], dim=-1)
        for entry, flat in zip(entries, points.flatten(1).tolist(), strict=True):
            entry["keypoints"] = flat
    return entries


def _encode(masks: Tensor) -> list[Entry]:
    """Masks (n, H, W) as COCO's compressed run lengths, which it counts down the columns."""
    columns = masks.transpose(1, 2).contiguous().to("cpu", torch.uint8).numpy()
    coded = rle.coco_masks().encode(columns.transpose(2, 1, 0)) if len(masks) else []
    return [{"size": list(code["size"]), "counts": code["counts"].decode("ascii")} for code in coded]
