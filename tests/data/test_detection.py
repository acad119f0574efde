"""Pictures with marked objects: COCO's layout with its gaps and faults, run lengths, and views with all that moves.

One file, though long: layouts, faults of annotations, views and loaders.
"""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anyres.data import BadImage, EvalLoader, Item, SizeSchedule, TrainLoader, rle
from anyres.data.detection import DigitScenes, open_detection
from anyres.data.detection_views import DetectionTest, DetectionViews, pad
from anyres.data.fitting import fit
from anyres.data.objects import REPORT, Objects
from anyres.errors import UserError
from tests.data.pictures import encode, noise
from tests.typed import as_a

pytest.importorskip("faster_coco_eval")

GREY: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)}
TRIANGLE = [10.0, 5, 40, 5, 10, 35]
SQUARE = {"size": [48, 64], "counts": rle.encode(np.pad(np.ones((20, 20)), ((10, 18), (20, 24)))).tolist()}


def annotation(number: int, image: int, category: int, box: list[float], **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0, "area": 7.5, **more}


def contents() -> dict[str, Any]:
    """Four pictures of 48x64; the third is empty, the fourth holds nothing but a crowd. Categories 90, 7, 3."""
    return {
        "images": [{"id": 5 * n, "file_name": f"{n}.png", "height": 48, "width": 64} for n in (4, 2, 3, 1)],
        "categories": [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}, {"id": 3, "name": "bird"}],
        "annotations": [
            annotation(1, 10, 7, [10, 5, 30, 30], segmentation=[TRIANGLE]),
            annotation(2, 20, 90, [20, 10, 20, 20], segmentation=SQUARE),
            annotation(3, 10, 3, [50, 40, 30, 30], segmentation=[[50.0, 40, 64, 40, 64, 48, 50, 48]]),
            annotation(4, 5, 7, [0, 0, 10, 10], segmentation=SQUARE, iscrowd=1),
        ],
    }


def write(folder: Path, data: Any, name: str = "instances_train2017.json", images: str = "train2017") -> Path:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / images).mkdir(parents=True, exist_ok=True)
    text = data if isinstance(data, str) else json.dumps(data)
    (folder / "annotations" / name).write_text(text)
    for number in range(1, 5):
        (folder / images / f"{number}.png").write_bytes(encode(noise(48, 64, number), "PNG"))
    return folder


def make_item(objects: Objects, pixels: np.ndarray | None = None) -> Item:
    data = np.zeros((*objects.size, 3), dtype=np.uint8) if pixels is None else pixels
    return Item("item", data, objects)


def make_objects(size: tuple[int, int], boxes: Any, **more: Any) -> Objects:
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    given = {"segments": None, "keypoints": None, "crowd": np.zeros(len(boxes), dtype=bool), **more}
    return Objects(boxes, np.arange(len(boxes)), areas=np.ones(len(boxes)), image_id=1, size=size, **given)


# Reading --------------------------------------------------------------------------------------------------------------


def test_ids_with_gaps_become_labels_in_their_order(tmp_path: Path) -> None:
    source = open_detection(write(tmp_path, contents()))
    assert source.label_names == ["bird", "cat", "dog"]
    assert source.category_ids == [3, 7, 90]
    assert [source.item(i).label.image_id for i in range(len(source))] == [20, 10]
    first = source.item(1)
    assert first.name == "2.png"
    assert first.label.labels.tolist() == [1, 0]
    assert first.label.boxes.tolist() == [[10, 5, 40, 35], [50, 40, 80, 70]]
    assert first.label.segments is None
    assert first.label.keypoints is None
    assert first.label.areas.tolist() == [7.5, 7.5]
    image, _ = source[0]
    assert image.size == (64, 48)


def test_validation_keeps_crowds_and_empty_images(tmp_path: Path) -> None:
    folder = write(tmp_path, contents(), "instances_val2017.json", "val2017")
    source = open_detection(folder, "val", masks=True)
    assert [source.item(i).label.image_id for i in range(len(source))] == [20, 10, 15, 5]
    assert source.item(3).label.crowd.tolist() == [True]
    assert rle.decode(source.item(3).label.segments[0], (48, 64)).sum() == 400
    assert len(source.item(2).label.boxes) == 0
    assert source.report == {**dict.fromkeys(REPORT, 0), "images": 4, "objects": 4, "crowds": 1, "empty_images": 2}
    assert len(open_detection(write(tmp_path / "b", contents()), keep_empty=True)) == 4


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("instances_train.json", "train"),
        ("train.json", "images/train"),
        ("fruit_train.json", "images"),
        ("train.json", "images/train2017"),
    ],
)
def test_other_layouts(tmp_path: Path, name: str, images: str) -> None:
    source = open_detection(write(tmp_path, contents(), name, images))
    assert source.item(0).data == tmp_path / images / "4.png"


def test_a_missing_file_is_named_with_the_layout(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no .*annotations.instances_val2017.json: .*val2017, val or images"):
        open_detection(write(tmp_path, contents()), "val")
    with pytest.raises(FileNotFoundError, match="person_keypoints_val2017"):
        open_detection(tmp_path, "val", keypoints=True)
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(contents()))
    with pytest.raises(FileNotFoundError, match="none of the folders val2017, val,"):
        open_detection(tmp_path, "val")
    for name in ("a_val.json", "b_val.json"):
        (tmp_path / "annotations" / name).write_text("{}")
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(UserError, match=r"both a_val.json and b_val.json"):
        open_detection(tmp_path, "val")
    with pytest.raises(UserError, match="'all' must be"):
        open_detection(tmp_path, "all")


def damaged(part: str, place: int, **more: Any) -> dict[str, Any]:
    data = contents()
    data[part][place] |= more
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", r"instances_train2017.json is no JSON \(.*\): copy"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "has no list of images"),
        ({"images": [], "categories": [], "annotations": []}, "lists no images"),
        ({**contents(), "categories": 3}, "has no list of categories"),
        (damaged("images", 1, width=None), "entry 1 of images .* has width None, which must be a whole number"),
        (damaged("images", 1, height=0), "below 1"),
        (damaged("images", 1, height=2**63), "height 9223372036854775808, which must be a whole number of at most 64"),
        (damaged("images", 1, id=-(2**70)), "has id -1180591620717411303424, which must be a whole number"),
        (damaged("categories", 1, id=2**64), "entry 1 of categories .* has id 18446744073709551616"),
        (damaged("images", 1, id=20), "two images of the same id"),
        (damaged("categories", 1, name="dog"), "two categories of the same name"),
        (damaged("annotations", 2, image_id=11), "annotation 3 .* has image_id 11, which is not among its images"),
        (damaged("annotations", 2, category_id=4), "annotation 3 .* has category_id 4, .* its categories"),
        ({**contents(), "annotations": []}, "marks no object"),
    ],
)
def test_damaged_files_are_refused_in_a_sentence(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_detection(write(tmp_path, data), masks=True)


@pytest.mark.parametrize("keep_empty", [False, True])
def test_missing_masks_and_keypoints_are_named_with_the_heads_that_need_none(tmp_path: Path, keep_empty: bool) -> None:
    data = contents()
    data["annotations"] = [{**entry, "segmentation": []} for entry in data["annotations"]]
    data["categories"][0]["keypoints"] = ["nose"]
    write(tmp_path, data, "train.json")
    for part in ("masks", "keypoints"):
        with pytest.raises(UserError, match=f"marks objects, but no {part} that can be used: .*retinanet, faster_rcnn"):
            open_detection(tmp_path, keep_empty=keep_empty, masks=part == "masks", keypoints=part == "keypoints")
    assert len(open_detection(tmp_path)) == 2
    del data["categories"][0]["keypoints"]
    with pytest.raises(UserError, match=r"no category .* names its keypoints: .*retinanet, faster_rcnn"):
        open_detection(write(tmp_path, data, "train.json"), keypoints=True)


def test_broken_marks_are_counted_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = contents()
    more: list[tuple[Any, dict[str, Any]]] = [
        ([1, 2, 3], {}),
        ([1, 2, -3, 4], {}),
        ([1, 2, float("nan"), 4], {}),
        ([1, 2, "x", 4], {}),
        (None, {}),
        ([63.5, 0, 30, 30], {"segmentation": [TRIANGLE]}),  # half a pixel inside
        ([0, 0, 9, 9], {"segmentation": [[1.0, 2, 3, 4], TRIANGLE]}),
        ([0, 0, 9, 9], {"segmentation": [[1.0, 2, 3, 4, 5, 6, 7], [0, 0, 9, 0, 9, None]]}),
        ([0, 0, 9, 9], {"segmentation": {"size": [64, 48], "counts": SQUARE["counts"]}}),
        ([0, 0, 9, 9], {"segmentation": {"size": [48, 64], "counts": SQUARE["counts"][:-1]}}),
        ([0, 0, 9, 9], {"segmentation": {"size": [48, 64], "counts": "garbage"}}),
        ([0, 0, 9, 9], {"segmentation": {"size": 7, "counts": [None]}}),
        ([0, 0, 9, 9], {"segmentation": [[0.0, 0, 1e8, 0, 1e8, 1e8], [0, 0, 9, 0, 9, -641]]}),
    ]
    data["annotations"] += [annotation(10 + i, 10, 3, box, **fields) for i, (box, fields) in enumerate(more)]
    source = open_detection(write(tmp_path, data), masks=True)
    assert source.report == {
        "images": 2,
        "objects": 12,
        "crowds": 1,
        "empty_images": 2,
        "bad_boxes": 5,
        "thin_boxes": 1,
        "bad_polygons": 5,
        "bad_runs": 4,
        "bad_keypoints": 0,
        "maskless": 6,
        "absent_images": 0,
    }
    (line,) = caplog.messages
    assert line.startswith(f"there are in the annotations of {tmp_path}/train objects whose box")
    assert "; run-length masks that do not fit their image: left out (4); objects" in line
    assert "keypoints" not in line
    assert source.item(1).label.trainable().tolist() == [True, True, False, True, *[False] * 6]
    sample = DetectionViews(**GREY).augment(source.item(1), [(48, 48)], random.Random(0))
    assert sample.targets[0]["labels"].tolist() == [1, 0, 0]


def test_areas_default_to_the_boxes(tmp_path: Path) -> None:
    for area in (None, -1, "x", float("nan")):
        data = damaged("annotations", 0, area=area)
        del data["annotations"][2]["area"]
        assert open_detection(write(tmp_path, data)).item(1).label.areas.tolist() == [900, 900]


def test_absent_images_are_told_when_data_are_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = contents()
    data["images"][0]["file_name"] = "more/4.png"
    folder = write(tmp_path, data)
    with pytest.raises(BadImage):
        open_detection(folder)[0]
    assert open_detection(folder).report["absent_images"] == 1
    assert "1 of the 2 images that" in caplog.text
    assert f"are not in {folder / 'train2017'}, the first is more/4.png: they count as unreadable" in caplog.text
    (folder / "train2017" / "more").mkdir()
    (folder / "train2017" / "4.png").rename(folder / "train2017" / "more" / "4.png")
    caplog.clear()
    assert open_detection(folder).report["absent_images"] == 0
    assert not caplog.text
    for file in folder.glob("train2017/**/*.png"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of the 2 images .* are not in .*: put them there"):
        open_detection(folder)


def test_missing_and_unfitting_images_are_bad(tmp_path: Path) -> None:
    source = open_detection(write(tmp_path, contents()))
    (tmp_path / "train2017" / "4.png").unlink()
    (tmp_path / "train2017" / "2.png").write_bytes(encode(noise(64, 48), "PNG"))
    with pytest.raises(BadImage, match=r"4\.png"):
        DetectionTest((48, 48), **GREY).prepare(source.item(0))
    with pytest.raises(BadImage, match="its marks are for 64x48 pixels, and the image has 48x64"):
        DetectionViews(**GREY).augment(source.item(1), [(48, 48)], random.Random(0))


def test_other_labels(tmp_path: Path) -> None:
    names = ["cow", "dog", "cat", "bird"]
    source = open_detection(write(tmp_path, contents()), label_names=names)
    assert source.label_names == names
    assert source.category_ids == [91, 90, 7, 3]
    assert source.item(1).label.labels.tolist() == [2, 3]
    with pytest.raises(UserError, match="'bird'"):
        open_detection(tmp_path, label_names=["dog", "cat"])


def with_keypoints() -> dict[str, Any]:
    data = contents()
    for category in data["categories"]:
        category["keypoints"] = ["nose", "left_eye", "right_eye"]
    data["annotations"][0]["keypoints"] = [20, 10, 2, 30, 12, 1, 0, 0, 0]
    data["annotations"][1]["keypoints"] = [1, 2, 3]
    return data


def test_keypoints(tmp_path: Path) -> None:
    write(tmp_path, contents())
    source = open_detection(write(tmp_path, with_keypoints(), "person_keypoints_train2017.json"), keypoints=True)
    assert source.keypoint_names == ("nose", "left_eye", "right_eye")
    assert source.flip_pairs == ((1, 2),)
    assert source.report["bad_keypoints"] == 1
    assert source.item(1).label.keypoints.tolist() == [[[20, 10, 2], [30, 12, 1], [0, 0, 0]], [[0, 0, 0]] * 3]
    (tmp_path / "annotations" / "person_keypoints_train2017.json").unlink()
    with pytest.raises(FileNotFoundError, match="person_keypoints"):
        open_detection(tmp_path, keypoints=True)
    with pytest.raises(UserError, match=r"no category of .* names its keypoints"):
        open_detection(write(tmp_path / "b", contents(), "train.json"), keypoints=True)
    with pytest.raises(UserError, match="keypoints 3, which must be a list of names"):
        open_detection(write(tmp_path / "c", damaged("categories", 0, keypoints=3), "train.json"), keypoints=True)


def test_sources_travel_to_workers(tmp_path: Path) -> None:
    source = open_detection(write(tmp_path, with_keypoints(), "train.json"), masks=True, keypoints=True)
    there = pickle.loads(pickle.dumps(source))
    for index in range(len(source)):
        one, other = source.item(index).label, there.item(index).label
        assert one.size == other.size
        assert np.array_equal(one.boxes, other.boxes)
        for mine, theirs in zip(one.segments, other.segments, strict=True):
            assert np.array_equal(np.array(mine), np.array(theirs))


def test_composed_digits() -> None:
    source = open_detection("digits", "val", masks=True, keypoints=True)
    assert source.report == {"images": len(source)}
    assert source.flip_pairs == ((3, 1),)
    objects = source.item(3).label
    for box, segment, area in zip(objects.boxes, objects.segments, objects.areas, strict=True):
        mask = rle.decode(segment, objects.size)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert area == mask.sum()
    assert open_detection("digits", "val").item(3).label.segments is None


# Run lengths ----------------------------------------------------------------------------------------------------------


def test_run_lengths_are_pycocotools() -> None:
    masks = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = (int(side) for side in rng.integers(1, 60, 2))
        blotches = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8)).resize((width, height))
        mask = (np.asarray(blotches) > rng.integers(0, 256)).astype(np.uint8)
        runs, size = rle.encode(mask), (height, width)
        assert np.array_equal(rle.decode(runs, size), mask)
        text = masks.encode(np.asfortranarray(mask))["counts"].decode()
        for counts in (text, runs.tolist()):
            assert np.array_equal(rle.read({"size": [height, width], "counts": counts}, size), runs)


def test_polygons_are_pycocotools() -> None:
    masks = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(50):
        polygons = [rng.uniform(-20, 60, 2 * rng.integers(3, 9)) for _ in range(rng.integers(1, 4))]
        theirs = masks.decode(masks.merge(masks.frPyObjects([polygon.tolist() for polygon in polygons], 37, 41)))
        assert np.array_equal(rle.draw(polygons, (37, 41)), theirs)


# Views ----------------------------------------------------------------------------------------------------------------


def picture(height: int, width: int, boxes: Any) -> np.ndarray:
    """Black, each box a white rectangle."""
    pixels = np.zeros((height, width), dtype=np.uint8)
    for x1, y1, x2, y2 in np.array(boxes, dtype=int):
        pixels[y1:y2, x1:x2] = 255
    return pixels


def corners(box: np.ndarray) -> np.ndarray:
    x1, y1, x2, y2 = box
    return np.array([x1, y1, x2, y1, x2, y2, x1, y2])


SETTINGS: list[dict[str, Any]] = [{}, {"hflip": 1.0}, {"multi_scale": True}, {"jitter": (0.1, 2.0)}, {"longest": 1.0}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("runs", [False, True])
def test_marks_stay_on_what_they_mark(settings: dict[str, Any], runs: bool) -> None:
    """In every view the box, the mask and the keypoints are where the white rectangle is."""
    box = np.array([20.0, 40, 80, 100])
    pixels = picture(120, 180, [box])
    segment: Any = rle.encode(pixels > 0) if runs else [corners(box)]
    points = np.array([[[20.0, 70, 2], [80, 70, 2], [50, 40, 1]]])
    objects = make_objects((120, 180), [box], segments=[segment], keypoints=points)
    views = DetectionViews(**GREY, flip_pairs=((0, 1),), **settings)
    seen, kept = 0, 0
    for seed in range(40):
        sizes = [(160, 160), (90, 200)]
        sample = views.augment(make_item(objects, pixels), sizes, random.Random(seed))
        for view, target in zip(sample.pixels, sample.targets, strict=True):
            white = view >= 128
            assert len(target["boxes"]) == len(target["masks"]) == len(target["keypoints"]) == len(target["labels"])
            if not len(target["boxes"]):
                assert white.mean() < 0.02
                continue
            kept += 1
            mask, found = target["masks"][0].astype(bool), target["boxes"][0]
            assert mask.shape == view.shape
            edge = white.any(0).sum() + white.any(1).sum()
            assert (mask != white).sum() <= 1.5 * edge
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            drawn = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(found - drawn).max() <= 1.2
            left, right, top = target["keypoints"][0]
            if left[2]:
                seen += 1
                assert abs(left[0] - found[0]) < 1e-3, "the left keypoint is on the left side, mirrored or not"
            if right[2]:
                assert abs(right[0] - found[2]) < 1e-3
            if top[2]:
                assert top[2] == 1
                assert abs(top[1] - found[1]) < 1e-3
    assert seen > 10
    assert kept > 40


def test_polygons_at_their_own_size_are_coco_s() -> None:
    masks = pytest.importorskip("pycocotools.mask")
    polygons = [np.array([5.2, 3.1, 60.7, 20.3, 30.3, 40.9]), np.array([50.0, 30, 63, 30, 63, 47, 50, 47])]
    objects = make_objects((48, 64), [[5, 3, 63, 47]], segments=[polygons])
    sample = DetectionViews(**GREY, hflip=0).augment(make_item(objects), [(48, 48)], random.Random(0))
    coded = masks.merge(masks.frPyObjects([polygon.tolist() for polygon in polygons], 48, 64))
    assert np.array_equal(sample.targets[0]["masks"][0], masks.decode(coded))


def test_sizes_of_views() -> None:
    objects = make_objects((300, 500), [[0, 0, 9, 9]])
    item = make_item(objects, np.zeros(objects.size, dtype=np.uint8))

    def shapes(size: tuple[int, int], **settings: Any) -> list[tuple[int, ...]]:
        views = DetectionViews(**GREY, **settings)
        return [views.augment(item, [size], random.Random(seed)).pixels[0].shape for seed in range(120)]

    assert set(shapes((60, 60))) == {fit(300, 500, (60, 60), 1333 / 800)} == {(60, 100)}
    assert set(shapes((60, 90))) == {(54, 90)}
    scaled = shapes((80, 80), multi_scale=True)
    assert {min(shape) for shape in scaled} <= {48, 51, 52, 54, 55, 58, 61, 64, 67, 68, 70, 71, 74, 77, 80}
    assert {(48, 80), (80, 133)} < set(scaled), "whole pictures of the smallest and the largest size"
    assert max(max(shape) for shape in scaled) <= 133
    jittered = shapes((80, 80), jitter=(0.1, 2.0))
    assert max(max(shape) for shape in jittered) == 80
    assert min(min(shape) for shape in jittered) < 10


def test_windows_of_the_multi_scale_recipe() -> None:
    """Half of the views show all of a picture, the others a window of the recipe's sides."""
    ramp = np.broadcast_to(np.arange(250, dtype=np.uint8), (150, 250))
    item = make_item(make_objects((150, 250), np.zeros((0, 4))), np.array(ramp))
    views = DetectionViews(**GREY, multi_scale=True, hflip=0)
    shares = []
    for seed in range(300):
        view = views.augment(item, [(400, 400)], random.Random(seed)).pixels[0]
        shares.append((float(view[:, -1].mean()) - float(view[:, 0].mean())) / 249)
    cut = np.array([share for share in shares if share < 0.98])
    assert 0.4 < len(cut) / 300 < 0.6
    # At a first side of 500 of 800, the picture is 833 wide, and windows are 384 to 600 wide.
    assert 384 / 1000 - 0.02 < cut.min() < 0.42
    assert 0.85 < cut.max() < 600 / 667 + 0.02


def test_what_is_outside_the_window_is_no_target() -> None:
    objects = make_objects(
        (100, 100), [[0, 0, 4, 4], [96, 96, 100, 100], [0, 0, 100, 100]], crowd=np.array([False, False, True])
    )
    views = DetectionViews(**GREY, multi_scale=True)
    counts = {len(views.augment(make_item(objects), [(80, 80)], random.Random(seed)).targets[0]["labels"])
              for seed in range(40)}  # fmt: skip
    assert counts == {0, 1, 2}
    points = np.array([[[50.0, 50, 2], [-3, 50, 2], [50, 50, 0]]])
    sample = DetectionViews(**GREY, hflip=0).augment(
        make_item(make_objects((100, 100), [[0, 0, 90, 90]], keypoints=points)), [(50, 50)], random.Random(0)
    )
    assert sample.targets[0]["keypoints"].tolist() == [[[25, 25, 2], [0, 0, 0], [0, 0, 0]]]


def test_an_object_whose_mask_is_cut_off_is_dropped() -> None:
    triangle = [np.array([0.0, 0, 100, 0, 0, 100])]  # the lower right half of its box is empty
    objects = make_objects((100, 100), [[0, 0, 100, 100]], segments=[triangle])
    views = DetectionViews(**GREY, jitter=(8.0, 8.0))
    for seed in range(20):
        (target,) = views.augment(make_item(objects), [(40, 40)], random.Random(seed)).targets
        assert len(target["boxes"]) == len(target["masks"])
        assert all(mask.any() for mask in target["masks"])


def test_batches_are_padded_after_normalisation() -> None:
    source = open_detection("digits", "train", masks=True, keypoints=True)
    views = DetectionViews(source.mean, source.std, source.flip_pairs)
    sizes = [(96, 96), (50, 50)]
    items = [source.item(i) for i in range(4)]
    samples = [views.augment(item, sizes, random.Random(i)) for i, item in enumerate(items)]
    made, targets = views.collate(items, samples, sizes)
    assert [view.targets for view in made] == targets
    for place, (size, view) in enumerate(zip(sizes, made, strict=True)):
        images, fitted, marks = view
        assert images.dtype == torch.float32
        assert images.shape[2] % 32 == images.shape[3] % 32 == 0
        assert images.shape[2] - 32 < max(h for h, _ in fitted) <= images.shape[2]
        for image, (h, w), target, sample in zip(images, fitted, marks, samples, strict=True):
            assert min(h, w) == size[0]
            assert image[:, h:].abs().sum() == image[:, :, w:].abs().sum() == 0
            pixels = torch.from_numpy(np.array(sample.pixels[place])).permute(2, 0, 1) / 255
            mean, std = (torch.tensor(values)[:, None, None] for values in (source.mean, source.std))
            assert torch.allclose(image[:, :h, :w], (pixels - mean) / std, atol=1e-6)
            assert (target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.int64)
            assert (target["masks"].dtype, target["masks"].shape[1:]) == (torch.uint8, (h, w))
            assert target["keypoints"].shape[1:] == (4, 3)
    jittered = DetectionViews(source.mean, source.std, jitter=(0.1, 0.2))
    samples = [jittered.augment(item, sizes, random.Random(0)) for item in items]
    assert [view.images.shape[2:] for view in jittered.collate(items, samples, sizes)[0]] == [(96, 96), (64, 64)]


def test_pad_makes_room_for_all() -> None:
    batch, sizes = pad([np.ones((3, 40), dtype=np.uint8), np.ones((33, 5), dtype=np.uint8)], (0.0,), (1.0,))
    assert batch.shape == (2, 1, 64, 64)
    assert sizes == [(3, 40), (33, 5)]


def test_loaders_take_them() -> None:
    source = open_detection("digits", "train", keypoints=True)
    views = DetectionViews(source.mean, source.std, source.flip_pairs, multi_scale=True)
    schedule = SizeSchedule([(64, 64), (48, 48)])
    batches = [
        next(TrainLoader(source, schedule, views, 3, workers=workers, epoch_size=3).epoch(0)) for workers in (0, 1)
    ]
    for one, other in zip(batches[0].views, batches[1].views, strict=True):
        assert torch.equal(one.images, other.images)
        for mine, theirs in zip(one.targets, other.targets, strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in ("boxes", "labels", "keypoints"))
    as_a(DigitScenes, source).scenes.count = 5
    test = DetectionTest((64, 64), source.mean, source.std)
    shown = list(EvalLoader(source, test, 2))
    assert [objects.image_id for batch in shown for objects in batch.truth] == [1, 2, 3, 4, 5]
    view, marked = shown[0].inputs, shown[0].truth
    assert view.targets == []
    assert view.sizes == [fit(objects.size[0], objects.size[1], (64, 64), 1333 / 800) for objects in marked]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"longest": 0.5}, "longest 0.5"),
        ({"hflip": 2}, "hflip 2"),
        ({"jitter": (2.0, 0.1)}, "jitter"),
        ({"jitter": [0.1, 2.0], "multi_scale": True}, "choose one"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DetectionViews(**GREY, **settings)
