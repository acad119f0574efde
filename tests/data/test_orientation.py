"""Pictures that EXIF says are to be turned, and the masks, boxes and polygons that were made on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from anyres.data import BadImage, Item, load_image
from anyres.data.detection import open_detection
from anyres.data.detection_views import DetectionTest, DetectionViews
from anyres.data.segmentation import Mask, open_segmentation
from anyres.data.segmentation_views import SegmentationTest, SegmentationViews
from tests.data.pictures import encode

GREY: Any = {"mean": (0.0,), "std": (1.0,)}
TABLE = np.array([0, 1, *[-1] * 253, 255], dtype=np.int16)
KINDS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}
BOX = (8, 16, 56, 40)
"""left, top, right, bottom of the white part of the pixels as they are stored."""


def pixels(height: int, width: int) -> np.ndarray:
    stored = np.zeros((height, width), dtype=np.uint8)
    stored[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    return stored


def photo(stored: np.ndarray, orientation: int, kind: str) -> tuple[bytes, np.ndarray]:
    """A file of these pixels that says it has to be turned, and its pixels after that."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(stored).convert("RGB"), kind, exif=exif, **KINDS[kind])
    image = Image.fromarray(stored)
    image.getexif()[0x0112] = orientation
    return data, np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(64, 96), (80, 80)])
def test_masks_lie_on_what_they_mark(shape: tuple[int, int], orientation: int, kind: str) -> None:
    """Whether they were made on the pixels as stored or on the upright picture, where the sizes tell these apart."""
    stored = pixels(*shape)
    data, upright = photo(stored, orientation, kind)
    for marks in [stored, upright] if stored.shape != upright.shape else [stored]:
        item = Item("x", data, Mask((marks > 0).astype(np.uint8), TABLE))
        sample = SegmentationTest((64, 64), **GREY).prepare(item)
        image, labels = sample.pixels, sample.truth
        assert np.array_equal(labels, marks > 0)
        assert image.shape == tuple(round(side * 64 / min(shape)) for side in marks.shape)
        resized = np.asarray(Image.fromarray(labels).resize(image.shape[::-1], Image.Resampling.NEAREST))
        assert ((image >= 128) != resized).mean() < 0.03
        views = SegmentationViews(**GREY, scale=(1, 1), photometric=False, largest_share=1)
        for view, target in views.augment(item, [(64, 64), (40, 48)], random.Random(0)):
            assert ((view >= 128) != target).mean() < 0.06


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_that_is_itself_to_be_turned_is_read_as_stored(orientation: int) -> None:
    stored = pixels(64, 96)
    data, _ = photo(stored, orientation, "JPEG")
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF"):
        mask = encode(Image.fromarray((stored > 0).astype(np.uint8)), kind, exif=exif)
        sample = SegmentationTest((64, 64), **GREY).prepare(Item("x", data, Mask(mask, TABLE)))
        image, labels = sample.pixels, sample.truth
        assert np.array_equal(labels, stored > 0)
        assert ((image >= 128) != labels).mean() < 0.03


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(64, 96), (80, 80)])
def test_boxes_and_polygons_lie_on_what_they_mark(tmp_path: Path, shape: tuple[int, int], orientation: int) -> None:
    stored = pixels(*shape)
    data, upright = photo(stored, orientation, "JPEG")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jpg").write_bytes(data)
    for marks in [stored, upright] if stored.shape != upright.shape else [stored]:
        rows, columns = np.flatnonzero(marks.any(1)), np.flatnonzero(marks.any(0))
        left, top, right, bottom = map(int, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        content = {
            "images": [{"id": 1, "file_name": "a.jpg", "height": marks.shape[0], "width": marks.shape[1]}],
            "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "bbox": [left, top, right - left, bottom - top],
                 "segmentation": [[left, top, right, top, right, bottom, left, bottom]]}
            ],
        }  # fmt: skip
        (tmp_path / "train" / "_annotations.coco.json").write_text(json.dumps(content))
        source = open_detection(tmp_path, masks=True)
        image = DetectionTest((min(shape), min(shape)), **GREY).prepare(source.item(0)).pixels
        assert ((image >= 128) != (marks > 0)).mean() < 0.03
        sample = DetectionViews(**GREY).augment(source.item(0), [(64, 64)], random.Random(1))
        assert ((sample.pixels[0] >= 128) != sample.targets[0]["masks"][0]).mean() < 0.05
        shown, _ = source[0]
        assert shown.size == marks.shape[::-1]


def test_pictures_of_a_source_are_shown_as_their_masks(tmp_path: Path) -> None:
    stored = pixels(64, 96)
    for folder, content in (("images", photo(stored, 6, "JPEG")[0]), ("masks", encode(Image.fromarray(stored), "PNG"))):
        for number in range(2):
            path = tmp_path / folder / f"{number}.{'jpg' if folder == 'images' else 'png'}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    source = open_segmentation(tmp_path, "all", mask_values=[0, 255])
    assert source[0][0].size == (96, 64)


def test_marks_of_neither_size_are_refused() -> None:
    data, _ = photo(pixels(64, 96), 6, "JPEG")
    assert load_image(data, "x", marked=(64, 96)).size == (96, 64)
    assert load_image(data, "x", marked=(96, 64)).size == load_image(data, "x").size == (64, 96)
    with pytest.raises(BadImage, match="its marks are for 64x95 pixels, and the image has 96x64: correct either"):
        load_image(data, "x", marked=(95, 64))
    straight, _ = photo(pixels(64, 96), 3, "JPEG")
    with pytest.raises(BadImage, match="64x96 pixels, and the image has 96x64"):
        load_image(straight, "x", marked=(96, 64))
