import numpy as np
import pytest

from anyres.data.composed import HEIGHTS, NARROWEST, VISIBLE, Scenes, draw_digit
from anyres.data.sources import Digits
from anyres.errors import UserError

SCENES = [Scenes("train").scene(index) for index in range(60)]


def test_a_scene_is_the_same_whoever_draws_it_and_differs_from_the_others():
    for first, again in zip(Scenes("train").scene(7), Scenes("train", count=8).scene(7), strict=True):
        assert first.dtype == again.dtype
        assert np.array_equal(first, again)
    assert not np.array_equal(Scenes("train").scene(7).image, Scenes("train", seed=1).scene(7).image)
    assert SCENES[0].image.shape != SCENES[1].image.shape or not np.array_equal(SCENES[0].image, SCENES[1].image)


def test_shapes_and_kinds():
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
    assert {len(scene.labels) for scene in SCENES} == {1, 2, 3, 4, 5}


def test_boxes_are_tight_around_the_visible_ink():
    for scene in SCENES:
        for box, mask in zip(scene.boxes, scene.masks, strict=True):
            x1, y1, x2, y2 = box.astype(int)
            assert mask[y1:y2, x1:x2].sum() == mask.sum()
            for side in (mask[y1, x1:x2], mask[y2 - 1, x1:x2], mask[y1:y2, x1], mask[y1:y2, x2 - 1]):
                assert side.any()


def test_masks_are_disjoint_and_make_the_classes():
    for scene in SCENES:
        assert scene.masks.sum(0).max() == 1
        painted = sum(mask * np.uint8(label + 1) for mask, label in zip(scene.masks, scene.labels, strict=True))
        assert np.array_equal(painted, scene.classes)


def test_keypoints_are_the_ends_of_the_ink_and_say_whether_they_are_seen():
    hidden = 0
    for scene in SCENES:
        for (x1, y1, x2, y2), mask, points in zip(scene.boxes, scene.masks, scene.keypoints, strict=True):
            for x, y, seen in points:
                assert mask[int(y), int(x)] == (seen == 2)
                hidden += seen == 1
            if (points[:, 2] == 2).all():  # a box around the visible ink then reaches as far
                (_, top), (right, _), (_, bottom), (left, _) = points[:, :2]
                assert (left, top, right, bottom) == (x1 + 0.5, y1 + 0.5, x2 - 0.5, y2 - 0.5)
    assert 0 < hidden < 60


def test_digits_are_of_many_sizes_stand_out_and_stay_mostly_visible():
    tall = []
    for scene in SCENES:
        light = scene.image.astype(float) @ [0.299, 0.587, 0.114]
        for (x1, y1, x2, y2), mask in zip(scene.boxes.astype(int), scene.masks, strict=True):
            tall.append((y2 - y1) / 128)
            window = np.s_[y1:y2, x1:x2]
            ground = light[window][(scene.classes == 0)[window]]
            assert not len(ground) or abs(light[mask].mean() - ground.mean()) > 20
    assert min(tall) < HEIGHTS[0] + 0.03
    assert max(tall) > HEIGHTS[1] - 0.06
    assert max(tall) < HEIGHTS[1] + 0.03
    assert VISIBLE > 0.5


def test_train_and_val_scenes_hold_different_digits():
    train, val = Scenes("train"), Scenes("val")
    assert (len(train), len(val)) == (1500, 200)
    assert not set(train.digits.indices) & set(val.digits.indices)
    assert np.array_equal(train.digits.images, Digits("train").images)
    assert not np.array_equal(train.scene(0).image, val.scene(0).image)


def test_a_drawn_digit_has_its_height_and_keeps_its_holes():
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
def test_refusals(arguments, words):
    with pytest.raises(UserError, match=words):
        Scenes(**arguments)


def test_an_index_beyond_the_end():
    with pytest.raises(IndexError):
        Scenes("val").scene(200)
