"""COCO's average precision: the numbers of its own code, and the way from a model's output to them.

One file, though long: every score of COCO with the case that tells it from a near miss.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from anyres.data import Item, rle
from anyres.data.detection import DigitScenes, open_detection
from anyres.data.objects import DetectionSource, Objects
from anyres.errors import UserError
from anyres.evaluation import evaluate
from anyres.tasks.detection import score as score_module
from anyres.tasks.detection.score import COCO_KEYPOINTS, average_precision
from tests.typed import as_a

pytest.importorskip("faster_coco_eval")

CATEGORIES = [3, 7, 90]
HEIGHT, WIDTH = 240, 320


def oval(box: np.ndarray, angles: np.ndarray) -> np.ndarray:
    return (box[:2] + box[2:] / 2 * (1 + np.stack([np.cos(angles), np.sin(angles)], axis=1))).ravel()


def random_truth(rng: np.random.Generator, keypoints: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Eight pictures of objects of all sizes, some of them crowds."""
    images = [{"id": 10 * number, "height": HEIGHT, "width": WIDTH} for number in range(1, 9)]
    truth = []
    for image in images:
        for _ in range(int(rng.integers(2, 9))):
            w, h = np.exp(rng.uniform(np.log(8), np.log(200), 2)).round(2)
            x, y = (rng.random(2) * (WIDTH - w, HEIGHT - h)).round(2)
            crowd = bool(rng.random() < 0.2)
            polygon = oval(np.array([x, y, w, h]), np.linspace(0, 6, 9) + rng.uniform(0, 0.3, 9)).round(2)
            segmentation: Any = [polygon.tolist()]
            if crowd:
                runs = rle.encode(rle.draw([polygon], (HEIGHT, WIDTH)))
                segmentation = {"size": [HEIGHT, WIDTH], "counts": runs.tolist()}
            points = np.stack(
                [x + w * rng.random(keypoints), y + h * rng.random(keypoints), rng.integers(0, 3, keypoints)], 1
            )
            points *= rng.random() < 0.8
            truth.append(
                {
                    "image_id": image["id"],
                    "category_id": int(rng.choice(CATEGORIES)),
                    "bbox": [float(x), float(y), float(w), float(h)],
                    "area": float(w * h * rng.uniform(0.4, 1)),  # never quite that of the mask
                    "iscrowd": int(crowd),
                    "segmentation": segmentation,
                    "keypoints": points.round(1).ravel().tolist(),
                    "num_keypoints": int((points[:, 2] > 0).sum()),
                }
            )
    return images, truth


def compressed(polygons: list[list[float]]) -> dict[str, Any]:
    library = rle.coco_masks()
    code = library.merge(library.frPyObjects(polygons, HEIGHT, WIDTH))
    return {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()}


def random_found(
    rng: np.random.Generator, images: list[dict[str, Any]], truth: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Detections near the objects, some twice or of the wrong class, and on the first picture a heap of others."""
    found = []
    for entry in [*truth, *truth, *rng.choice(np.array(truth, dtype=object), 40)]:
        if rng.random() < 0.2:
            continue
        x, y, w, h = np.array(entry["bbox"]) * rng.normal(1, 0.06, 4)
        points = np.array(entry["keypoints"]).reshape(-1, 3) + rng.normal(0, 3, (len(entry["keypoints"]) // 3, 3))
        found.append(
            {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"] if rng.random() < 0.9 else 7,
                "bbox": [float(x), float(y), float(w), float(h)],
                "score": round(rng.random(), 2),  # with ties
                "keypoints": points.ravel().tolist(),
            }
        )
    for _ in range(250):  # more than the hundred of a class that count
        x, y, w, h = rng.uniform(0, 100, 4)
        points = rng.uniform(0, 100, len(truth[0]["keypoints"]))
        found.append(
            {
                "image_id": images[0]["id"],
                "category_id": truth[0]["category_id"],
                "bbox": [float(x), float(y), float(w), float(h)],
                "score": round(rng.random(), 2),
                "keypoints": points.tolist(),
            }
        )
    for entry in found:
        entry["segmentation"] = compressed([oval(np.array(entry["bbox"]), np.linspace(0, 6, 9)).tolist()])
    return found


def reference(
    images: list[dict[str, Any]], truth: list[dict[str, Any]], found: list[dict[str, Any]], kind: str
) -> dict[str, float]:
    """What pycocotools says of files with these contents, for the objects that count in each of the sizes."""
    coco, cocoeval = (pytest.importorskip(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
    only = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[kind]
    with contextlib.redirect_stdout(io.StringIO()):
        real = coco.COCO()
        real.dataset = {
            "images": images,
            "categories": [{"id": number, "name": str(number)} for number in CATEGORIES],
            "annotations": [{**entry, "id": number + 1} for number, entry in enumerate(truth)],
        }
        real.createIndex()
        files = [{key: entry[key] for key in ("image_id", "category_id", "score", only)} for entry in found]
        judge = cocoeval.COCOeval(real, real.loadRes(files), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
    if kind == "keypoints":
        names.remove("ap_small")
    return {name: 100 * float(value) for name, value in zip(names, judge.stats, strict=False) if value >= 0}


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_are_pycocotools(kind: str, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(seed)
    images, truth = random_truth(rng, 17)
    found = random_found(rng, images, truth)
    scores = average_precision(images, CATEGORIES, truth, found, kind, COCO_KEYPOINTS)
    assert scores == pytest.approx(reference(images, truth, found, kind), abs=1e-9)
    assert 5 < scores["ap"] < 95
    assert len(set(scores.values())) == len(scores)
    assert not any(capsys.readouterr())


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_right_and_missing_detections(kind: str) -> None:
    images, truth = random_truth(np.random.default_rng(2), 4)
    truth = [{**entry, "iscrowd": 0} for entry in truth if entry["num_keypoints"] and not entry["iscrowd"]]
    found = [{**entry, "score": 0.5, "segmentation": compressed(entry["segmentation"])} for entry in truth]
    assert min(average_precision(images, CATEGORIES, truth, found, kind).values()) == pytest.approx(100)
    assert set(average_precision(images, CATEGORIES, truth, [], kind).values()) == {0.0}


def test_a_keypoint_error_counts_by_the_spread() -> None:
    """Overlap exp(-d² / (8 · sigma² · area)) by its definition, for keypoints that are not COCO's."""
    images = [{"id": 1, "height": 100, "width": 100}]
    entry = {"image_id": 1, "category_id": 3, "bbox": [10.0, 10.0, 50.0, 50.0], "area": 2500.0, "iscrowd": 0}
    truth = [{**entry, "keypoints": [20.0, 20.0, 2.0, 50.0, 50.0, 2.0], "num_keypoints": 2}]
    for distance, hits in ((6.0, 0), (5.0, 2)):  # overlaps 0.49 and 0.61
        found = [{**entry, "score": 1.0, "keypoints": [20 + distance, 20.0, 1.0, 50.0, 50 + distance, 1.0]}]
        assert average_precision(images, [3], truth, found, "keypoints")["ap"] == pytest.approx(10 * 1.5 * hits)


def test_spreads_of_persons_are_for_persons_alone() -> None:
    """17 keypoints of an animal are not COCO's, nor are a person's in another order."""
    rng = np.random.default_rng(0)
    images, truth = random_truth(rng, 17)
    found = random_found(rng, images, truth)

    def score(names: Sequence[str]) -> float:
        return average_precision(images, CATEGORIES, truth, found, "keypoints", names)["ap"]

    person = score(COCO_KEYPOINTS)
    assert score([name.replace("_", " ").title() for name in COCO_KEYPOINTS]) == person
    animal = score([f"joint{number}" for number in range(17)])
    assert animal == score(COCO_KEYPOINTS[::-1]) == score(())
    assert abs(animal - person) > 1


@pytest.mark.parametrize("names", [("left", "right"), COCO_KEYPOINTS])
def test_the_result_tells_what_spread_its_keypoints_have(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def average_precision(*these: Any) -> dict[str, float]:
        given.append(these[5])
        return {"ap": 1.0}

    monkeypatch.setattr(score_module, "average_precision", average_precision)
    source = Boxes()
    source.keypoint_names = names
    assert ("uses the sigma 0.05" in evaluate(Knows(source), source, (64, 64)).note) == (len(names) < 17)
    assert set(given) == {names}


class Boxes(DetectionSource):
    """Grey pictures, each of its own size, with rectangles whose mask is all of their box."""

    def __init__(self, count: int = 5, broken: tuple[int, ...] = (), whole: bool = True) -> None:
        super().__init__("boxes", ["cat", "dog"], in_chans=1)
        self.count, self.broken, self.whole = count, broken, whole
        self.mean, self.std = (0.0,), (1.0,)
        self.category_ids, self.keypoint_names, self.report = [3, 9], ("left", "right"), {}

    def __len__(self) -> int:
        return self.count

    def _item(self, index: int) -> Item:
        size = (60 + 7 * index, 80)
        boxes = np.array([[4.0, 6, 30, 40], [20, 10, 76, 50 + index]])
        segments: list[Any] = [[box[[0, 1, 2, 1, 2, 3, 0, 3]]] for box in boxes]
        objects = Objects(
            boxes=boxes,
            labels=np.array([0, 1]),
            crowd=np.array([False, False]),
            areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
            segments=segments if self.whole else None,
            keypoints=np.concatenate([boxes.reshape(2, 2, 2), np.full((2, 2, 1), 2.0)], axis=2) if self.whole else None,
            image_id=100 + index,
            size=size,
        )
        data: Any = b"no picture" if index in self.broken else np.full(size, index, dtype=np.uint8)
        return Item(f"boxes/{index}", data, objects)


class Knows(nn.Module):
    """Reads off a picture's brightness which it is, and says what is in it, moved by `off` pixels of the original."""

    task = "detection"

    def __init__(self, source: Boxes, off: float = 0.0, **cfg: Any) -> None:
        super().__init__()
        self.source, self.off, self.num_classes, self.in_chans = source, off, 2, 1
        self.pretrained_cfg = {"label_names": source.label_names, **cfg}
        self.weight = nn.Parameter(torch.zeros(1))
        self.shift = 0

    def forward(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        outputs = []
        for image, (height, width) in zip(images, sizes, strict=True):
            assert image[:, height:].abs().sum() == 0
            objects = self.source.item(round(float(image[0, 0, 0]) * 255)).label
            scale = torch.tensor([width / objects.size[1], height / objects.size[0]])
            points = torch.from_numpy(objects.boxes).float().view(-1, 2, 2) + self.off
            points = points * scale
            outputs.append(
                {
                    "boxes": points.flatten(1),
                    "labels": torch.from_numpy(objects.labels) + self.shift,
                    "scores": torch.tensor([0.9, 0.8]),
                    "masks": torch.ones(2, 1, 28, 28),
                    "keypoints": torch.cat([points, torch.ones(2, 2, 1)], dim=2),
                }
            )
        return outputs


@pytest.mark.parametrize(("size", "batch_size"), [((64, 64), 1), ((160, 160), 2), ((50, 200), 5)])
def test_a_model_that_knows_all(size: tuple[int, int], batch_size: int) -> None:
    source = Boxes()
    model = Knows(source).train()
    measured = evaluate(model, source, size, batch_size)
    assert model.training
    assert measured.count == 5
    assert not measured.bad_images
    assert next(iter(measured.scores)) == "ap"
    assert {"mask_ap", "mask_ap75", "keypoint_ap", "keypoint_ap_medium"} < set(measured.scores)
    assert "ap_large" not in measured.scores, "nothing here is as large as that"
    assert min(measured.scores.values()) == pytest.approx(100)


def test_boxes_are_judged_in_original_pixels() -> None:
    source = Boxes()
    at_small, at_large = (evaluate(Knows(source, off=3.0), source, (s, s)).scores for s in (32, 256))
    assert at_small == pytest.approx(at_large)
    assert 0 < at_small["ap"] < 100


def test_only_what_the_source_was_asked_for_is_scored() -> None:
    source = Boxes(whole=False)
    assert set(evaluate(Knows(source), source, (64, 64)).scores) == {
        "ap",
        "ap50",
        "ap75",
        "ap_small",
        "ap_medium",
    }


def test_objects_without_a_mask_neither_count_nor_hurt() -> None:
    class Half(Boxes):
        def _item(self, index: int) -> Item:
            item = super()._item(index)
            return item._replace(label=item.label._replace(segments=[item.label.segments[0], None]))

    class Cautious(Knows):
        def forward(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
            outputs = super().forward(images, sizes)
            for output in outputs:
                output["masks"][1, :, 5:] = 0
            return outputs

    scores = evaluate(Cautious(Half()), Half(), (64, 64)).scores
    assert (scores["ap"], scores["mask_ap"]) == pytest.approx((100, 100))


def test_unreadable_images_are_left_out_with_their_objects() -> None:
    source = Boxes(broken=(1, 3), whole=False)
    measured = evaluate(Knows(source), source, (64, 64), 2)
    assert not measured.note
    assert measured.count == 3
    assert measured.scores["ap"] == pytest.approx(100)
    assert [name.split(":")[0] for name in measured.bad_images] == ["boxes/1", "boxes/3"]
    with pytest.raises(UserError, match="no readable image"):
        evaluate(Knows(source), Boxes(1, broken=(0,)), (64, 64))


def test_classes_are_matched_by_name() -> None:
    source = Boxes()
    model = Knows(source, label_names=["bird", "cat", "dog"])
    model.shift, model.num_classes = 1, 3
    assert evaluate(model, source, (64, 64)).scores["ap"] == pytest.approx(100)
    model.pretrained_cfg = {}  # three outputs that say nothing of themselves
    with pytest.raises(UserError, match="cannot be matched"):
        evaluate(model, source, (64, 64))


def test_classes_without_an_object_are_told() -> None:
    class Third(Boxes):
        def __init__(self) -> None:
            super().__init__(whole=False)
            self.label_names, self.category_ids = ["cat", "dog", "cow"], [3, 9, 4]

    model = Knows(Third())
    model.num_classes = 3
    measured = evaluate(model, Third(), (64, 64))
    assert measured.scores["ap"] == pytest.approx(100)
    assert measured.note == "AP is the mean over 2 of 3 classes: the others have no annotated objects"


def test_broken_numbers_stop_the_test() -> None:
    source = Boxes()

    class Diverged(Knows):
        def forward(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
            return [{**output, "scores": output["scores"] * torch.nan} for output in super().forward(images, sizes)]

    with pytest.raises(UserError, match=r"outputs of Diverged for the images \[100\] contain NaN"):
        evaluate(Diverged(source), source, (64, 64))


def test_a_hundred_detections_count() -> None:
    source = Boxes(1)

    class Busy(Knows):
        def forward(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
            (output,) = super().forward(images, sizes)
            noise = {
                "boxes": torch.tensor([[0.0, 0, 5, 5]]).repeat(99, 1),
                "labels": torch.zeros(99, dtype=torch.int64),
                "scores": torch.full((99,), 0.85),
                "masks": torch.ones(99, 1, 28, 28),
                "keypoints": torch.ones(99, 2, 3),
            }
            return [{name: torch.cat([output[name], noise[name]]) for name in output}]

    assert evaluate(Busy(source), source, (64, 64)).scores["ap50"] == pytest.approx(50), "the second is lost"


def test_result_files(tmp_path: Any) -> None:
    source = Boxes(2)
    evaluate(Knows(source), source, (64, 64), results=tmp_path / "results.json")
    entries = json.loads((tmp_path / "results.json").read_text())
    assert [(entry["image_id"], entry["category_id"]) for entry in entries] == [(100, 3), (100, 9), (101, 3), (101, 9)]
    assert entries[1]["bbox"] == pytest.approx([20, 10, 56, 40], abs=1e-4)
    assert entries[1]["segmentation"]["size"] == [60, 80]
    assert entries[1]["keypoints"][3] == pytest.approx(76, abs=1e-4)
    masks = pytest.importorskip("pycocotools.mask")
    assert masks.toBbox(entries[1]["segmentation"]).tolist() == [20, 10, 56, 40]


def test_composed_digits_without_detections() -> None:
    source = open_detection("digits", "val", masks=True, keypoints=True)
    as_a(DigitScenes, source).scenes.count = 3

    class Blind(nn.Module):
        task = "detection"

        num_classes = 10

        def forward(self, images: Tensor, sizes: Any) -> list[dict[str, Tensor]]:
            empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
            return [{**empty, "masks": torch.zeros(0, 1, 28, 28), "keypoints": torch.zeros(0, 4, 3)} for _ in images]

    scores = evaluate(Blind(), source, (64, 64), 2).scores
    assert {"ap", "mask_ap", "keypoint_ap"} < set(scores)
    assert set(scores.values()) == {0.0}


def measure_share(rank: int, port: int, answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    source = Boxes(broken=(1,))
    measured = evaluate(Knows(source, off=3.0), source, (64, 64))
    answers.put((measured.scores, measured.count, measured.bad_images))
    dist.destroy_process_group()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="starts its processes by fork")
def test_processes_share_the_pictures() -> None:
    source = Boxes(broken=(1,))
    alone = evaluate(Knows(source, off=3.0), source, (64, 64))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [context.Process(target=measure_share, args=(rank, port, answers)) for rank in range(2)]
    for child in children:
        child.start()
    shares = [answers.get(timeout=60) for _ in children]
    for child in children:
        child.join(timeout=60)
    assert shares == [(alone.scores, 4, alone.bad_images)] * 2
