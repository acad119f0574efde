from typing import Any

import numpy as np
import pytest

from anyres.data.composed import HEIGHTS, MARGIN, NARROWEST, VISIBLE, Scenes, cut_out, draw_digit
from anyres.data.sources import Digits
from anyres.errors import UserError

SCENES = [Scenes("train").scene(index) for index in range(60)]


def test_a_scene_is_the_same_whoever_draws_it_and_differs_from_the_others() -> None:
    for first, again in zip(Scenes("train").scene(7), Scenes("train", count=8).scene(7), strict=True):
        assert first.dtype == again.dtype
        assert np.array_equal(first, again)
    assert not np.array_equal(Scenes("train").scene(7).image, Scenes("train", seed=1).scene(7).image)
    assert SCENES[0].image.shape != SCENES[1].image.shape or not np.array_equal(SCENES[0].image, SCENES[1].image)


def test_shapes_and_kinds() -> None:
    for image, boxes, labels, masks, keypoints, classes in SCENES:
        height, width = image.shape[:2]
        assert max(height, width) == 128
        assert min(height, width) >= round(128 * NARROWEST)
        assert image.shape == (height, width, 3)
        assert image.dtype == classes.dtype == np.uint8
        count = len(labels)
        assert 1 <= count <= 5
        assert boxes.shape == (count, 4)
        assert masks.shape == (count, height, width)
        assert masks.dtype == bool
        assert keypoints.shape == (count, 4, 3)
        assert boxes.dtype == keypoints.dtype == np.float32
        assert labels.dtype == np.int64
    assert len({scene.image.shape for scene in SCENES}) > 10
    assert {len(scene.labels) for scene in SCENES} >= {1, 2, 3, 4}


def test_boxes_are_tight_around_what_shows() -> None:
    for scene in SCENES:
        for box, mask in zip(scene.boxes, scene.masks, strict=True):
            x1, y1, x2, y2 = box.astype(int)
            assert mask[y1:y2, x1:x2].sum() == mask.sum()
            for side in (mask[y1, x1:x2], mask[y2 - 1, x1:x2], mask[y1:y2, x1], mask[y1:y2, x2 - 1]):
                assert side.any()


def test_masks_are_disjoint_and_make_the_classes() -> None:
    for scene in SCENES:
        assert scene.masks.sum(0).max() == 1
        painted = sum(mask * np.uint8(label + 1) for mask, label in zip(scene.masks, scene.labels, strict=True))
        assert np.array_equal(painted, scene.classes)


def test_keypoints_are_the_ends_of_the_paper_and_say_whether_they_are_seen() -> None:
    hidden = 0
    for scene in SCENES:
        for (x1, y1, x2, y2), mask, points in zip(scene.boxes, scene.masks, scene.keypoints, strict=True):
            for x, y, seen in points:
                assert mask[int(y), int(x)] == (seen == 2)
                hidden += seen == 1
            if (points[:, 2] == 2).all():  # the box then reaches as far
                (_, top), (right, _), (_, bottom), (left, _) = points[:, :2]
                assert (left, top, right, bottom) == (x1 + 0.5, y1 + 0.5, x2 - 0.5, y2 - 0.5)
    assert 0 < hidden < 60


def test_digits_are_of_many_sizes_and_dark_on_light_paper() -> None:
    tall = []
    for scene in SCENES:
        light = scene.image.astype(float) @ [0.299, 0.587, 0.114]
        for (_, y1, _, y2), mask in zip(scene.boxes, scene.masks, strict=True):
            tall.append((y2 - y1) / 128)
            ink, paper = np.percentile(light[mask], (10, 90))
            assert ink < 110
            assert paper > 150
            assert 0.1 < (light[mask] < 110).mean() < 0.8
    whole = [
        [
            cut_out(draw_digit(digit, 128 * height), 128 * height)[1].shape[0] / 128
            for digit in Digits("train").images[:90]
        ]
        for height in HEIGHTS
    ]
    assert min(whole[0]) * VISIBLE - 0.02 < min(tall) < max(whole[0]) + 0.03
    assert max(whole[1]) - 0.06 < max(tall) < max(whole[1]) + 0.02


def test_at_least_the_promised_share_of_every_sticker_is_visible() -> None:
    whole = 0
    for scene in SCENES:
        for mask, points in zip(scene.masks, scene.keypoints, strict=True):
            (_, top), (right, _), (_, bottom), (left, _) = points[:, :2]
            # The paper of a digit fills less than its rectangle: a lower bound for what shows of it.
            assert mask.sum() > 0.4 * VISIBLE * (bottom - top + 1) * (right - left + 1)
            whole += (points[:, 2] == 2).all()
    assert whole > 100


def test_paper_surrounds_the_ink() -> None:
    drawn = draw_digit(Digits("val").images[0], 40)
    ink, paper = cut_out(drawn, 40)
    assert ink.shape == paper.shape
    assert (paper[ink >= 0.5] == 1).all()
    assert ink.sum() == pytest.approx(drawn.sum(), rel=1e-5)
    rows, inked = (np.flatnonzero((picture >= 0.5).any(1)) for picture in (paper, ink))
    for margin in (inked[0] - rows[0], rows[-1] - inked[-1]):  # around the thin end of a stroke
        assert 2 < margin < MARGIN * 40 + 1.5
    ink, paper = cut_out(np.ones((40, 40), dtype=np.float32), 40)  # around straight edges
    rows, inked = (np.flatnonzero(picture[:, picture.shape[1] // 2] >= 0.5) for picture in (paper, ink))
    assert inked[0] - rows[0] == pytest.approx(MARGIN * 40, abs=1.5)
    assert rows[-1] - inked[-1] == pytest.approx(MARGIN * 40, abs=1.5)


def test_train_and_val_scenes_hold_different_digits() -> None:
    train, val = Scenes("train"), Scenes("val")
    assert (len(train), len(val)) == (4000, 200)
    assert not set(train.digits.indices) & set(val.digits.indices)
    assert np.array_equal(train.digits.images, Digits("train").images)
    assert not np.array_equal(train.scene(0).image, val.scene(0).image)


def test_a_drawn_digit_has_its_height_and_keeps_its_holes() -> None:
    zero = Digits("val").images[0]
    assert Digits("val").labels[0] == 0
    for height in (18, 56):
        drawn = draw_digit(zero, height)
        assert drawn.min() >= 0
        assert drawn.max() == 1
        rows = np.flatnonzero((drawn >= 0.5).any(1))
        assert abs(rows[-1] + 1 - rows[0] - height) <= 0.1 * height
        centre = drawn[drawn.shape[0] // 2, drawn.shape[1] // 2]
        assert centre < 0.5
    assert draw_digit(zero, 40, stretch=1.3).shape[1] > draw_digit(zero, 40).shape[1]


@pytest.mark.parametrize(("arguments", "words"), [
    ({"split": "all"}, "split 'all'"),
    ({"split": "val", "side": 16}, "side 16"),
    ({"split": "val", "count": 0}, "count 0"),
])  # fmt: skip
def test_refusals(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Scenes(**arguments)


def test_stickers_larger_than_the_scene_are_left_out_and_every_scene_has_one() -> None:
    tall = 48 * HEIGHTS[1]
    shapes = [cut_out(draw_digit(digit, tall, stretch=1.15), tall)[1].shape for digit in Digits("all").images[::5]]
    assert max(map(max, shapes)) > round(48 * NARROWEST)
    scenes = Scenes("train", side=48)
    assert all(scenes.scene(index).labels.size for index in range(300))


def test_an_index_beyond_the_end() -> None:
    with pytest.raises(IndexError):
        Scenes("val").scene(200)
