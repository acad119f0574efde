"""Masked images: sources, masks, views, loaders.

One file, though long: layouts, masks, views and loaders.
"""

import colorsys
import pickle
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from anyres.data import BadImage, EvalLoader, Item, MapSource, SizeSchedule, TrainLoader, segmentation
from anyres.data.composed import Scenes
from anyres.data.decode import Data
from anyres.data.samples import prepare_batches
from anyres.data.segmentation import IGNORED, Mask, check_masks, open_segmentation
from anyres.data.segmentation_views import SegmentationTest, SegmentationViews, jitter_colours
from anyres.data.views import normalize, to_batch
from anyres.errors import UserError
from tests.data.pictures import encode, noise, png, tiff
from tests.typed import as_a

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
TABLE = np.array([*range(5), *[-1] * 250, IGNORED], dtype=np.int16)


def blocks(height: int, width: int, values: Sequence[int], seed: int = 0) -> np.ndarray:
    """A mask of 8x8 blocks of these values."""
    rng = np.random.default_rng(seed)
    small = rng.choice(np.array(values, dtype=np.uint8), (-(-height // 8), -(-width // 8)))
    return np.kron(small, np.ones((8, 8), np.uint8))[:height, :width]


def write(
    root: Path,
    images: str,
    masks: str,
    names: Iterable[str],
    values: Sequence[int] = (0, 1, 2, 255),
    size: tuple[int, int] = (24, 32),
) -> Path:
    for number, name in enumerate(names):
        for folder, data in (
            (images, encode(noise(size[0], size[1], number))),
            (masks, encode(Image.fromarray(blocks(size[0], size[1], values, number)), "PNG")),
        ):
            path = root / folder / (f"{name}.jpg" if folder == images else f"{name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


def load(source: MapSource, index: int) -> np.ndarray:
    name, _, mask = source.item(index)
    return mask.labels(name)


def item(height: int = 40, width: int = 60, values: Sequence[int] = (0, 1, 2, 3, 4), seed: int = 0) -> Item:
    """A picture whose every pixel is 50 times its class, and 255 where ignored."""
    labels = blocks(height, width, values, seed)
    grey = np.where(labels == IGNORED, 255, 50 * labels.astype(int)).astype(np.uint8)
    return Item("picture", np.stack([grey] * 3, -1), Mask(labels, TABLE))


# Sources ------------------------------------------------------------------------------------------------------------


def test_digits_are_the_scenes() -> None:
    source = open_segmentation("digits", "val")
    assert len(source) == 200
    assert source.label_names == ["background", *"0123456789"]
    scene = Scenes("val").scene(3)
    assert np.array_equal(as_a(np.ndarray, source.item(3).data), scene.image)
    assert np.array_equal(load(source, 3), scene.classes)
    with pytest.raises(UserError, match="11 classes"):
        open_segmentation("digits", num_classes=10)


def test_ade20k_layout(tmp_path: Path) -> None:
    write(tmp_path, "images/training", "annotations/training", ["a", "b"], values=(0, 1, 150, 255))
    write(tmp_path, "images/validation", "annotations/validation", ["c"])
    (tmp_path / "images" / "training" / ".hidden.jpg").write_bytes(b"")
    train = open_segmentation(tmp_path, "train")
    assert [train.item(i).name for i in range(len(train))] == ["images/training/a.jpg", "images/training/b.jpg"]
    assert train.label_names == [str(place) for place in range(150)]
    stored = blocks(24, 32, (0, 1, 150, 255), 1)
    expected = np.select([stored == 1, stored == 150], [0, 149], IGNORED)
    assert np.array_equal(load(train, 1), expected)
    assert [len(open_segmentation(tmp_path, split)) for split in ("val", "all")] == [1, 3]
    whole = open_segmentation(tmp_path, "train", num_classes=151, reduce_zero_label=False)
    assert np.array_equal(load(whole, 1), stored)
    assert not open_segmentation(tmp_path, "val", num_classes=3).table[0]  # not ADE20K's classes: nothing is reduced
    table = "Idx\tRatio\tTrain\tVal\tName\n1\t0.2\t1\t1\twall\n2\t0.1\t1\t1\tbuilding, edifice\n"
    (tmp_path / "objectInfo150.txt").write_text(table)
    named = open_segmentation(tmp_path, "val", reduce_zero_label=True)
    assert named.label_names == ["wall", "building, edifice"]
    assert set(np.unique(load(named, 0))) == {0, 1, IGNORED}


@pytest.mark.parametrize("masks", ["masks", "labels", "annotations"])
def test_plain_layout(tmp_path: Path, masks: str) -> None:
    write(tmp_path, "images/train", f"{masks}/train", ["x/1", "x/2", "y/1"])
    write(tmp_path, "images/test", f"{masks}/test", ["1"])
    (tmp_path / "classes.txt").write_text("sky\nsea\n\nland\n")
    train = open_segmentation(tmp_path, "train")
    assert train.label_names == ["sky", "sea", "land"]
    assert train.item(2).name == "images/train/y/1.jpg"
    assert np.array_equal(load(train, 2), blocks(24, 32, (0, 1, 2, 255), 2))
    assert len(open_segmentation(tmp_path, "val")) == 1


def test_a_tenth_is_held_out_without_split_folders(tmp_path: Path) -> None:
    write(tmp_path, "images", "masks", [f"{number:02d}" for number in range(20)])
    parts = {split: open_segmentation(tmp_path, split, num_classes=3) for split in ("train", "val", "all")}
    names = {split: {source.item(i).name for i in range(len(source))} for split, source in parts.items()}
    assert [len(names[split]) for split in parts] == [18, 2, 20]
    assert names["train"] | names["val"] == names["all"]


def test_a_hugging_face_table(tmp_path: Path) -> None:
    stored = [blocks(24, 32, (0, 1, 2), number) for number in range(20)]
    rows = {
        "annotation": [{"bytes": encode(Image.fromarray(mask), "PNG"), "path": None} for mask in stored],
        "image": [{"bytes": encode(noise(24, 32, number)), "path": None} for number in range(20)],
        "text": ["x"] * 20,
    }
    kinds = {"annotation": datasets.Image(), "image": datasets.Image(), "text": datasets.Value("string")}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    table.save_to_disk(tmp_path / "saved")
    spec = f"hf:{tmp_path / 'saved'}"
    source = open_segmentation(spec, "val", num_classes=2, reduce_zero_label=True)
    assert len(source) == 2
    assert source.item(0).data == encode(noise(24, 32, 9))
    assert np.array_equal(load(source, 0), np.array([IGNORED, 0, 1])[stored[9]])
    with pytest.raises(UserError, match="num_classes"):
        open_segmentation(spec)
    table.remove_columns("annotation").save_to_disk(tmp_path / "bare")
    with pytest.raises(UserError, match="no mask column"):
        open_segmentation(f"hf:{tmp_path / 'bare'}", num_classes=2)
    table.remove_columns("image").save_to_disk(tmp_path / "blind")
    with pytest.raises(UserError, match="no image column"):
        open_segmentation(f"hf:{tmp_path / 'blind'}", num_classes=2)


def test_classes_are_numbered_by_a_checkpoints_names(tmp_path: Path) -> None:
    write(tmp_path, "images", "masks", ["a"])
    (tmp_path / "names.txt").write_text("sky\nsea\nland\n")
    source = open_segmentation(tmp_path, "train", label_names=["land", "air", "sea", "sky"])
    assert np.array_equal(load(source, 0), np.array([3, 2, 0, *[0] * 252, 255])[blocks(24, 32, (0, 1, 2, 255))])
    with pytest.raises(UserError, match="'sky'"):
        open_segmentation(tmp_path, "train", label_names=["land", "sea"])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_segmentation(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="annotations, masks, labels"):
        open_segmentation(tmp_path)
    write(tmp_path, "images/train", "masks/train", ["a", "b", "c"])
    with pytest.raises(UserError, match="how many classes"):
        open_segmentation(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"val, valid.*add one"):
        open_segmentation(tmp_path, "val", num_classes=3)
    for count in (0, 256):
        with pytest.raises(UserError, match=f"{count} classes"):
            open_segmentation(tmp_path, num_classes=count)
    (tmp_path / "masks" / "train" / "c.png").unlink()
    (tmp_path / "masks" / "train" / "b.png").rename(tmp_path / "masks" / "train" / "b.jpg")
    with pytest.raises(UserError, match=r"2 of 3 images .* the first is b\.jpg"):
        open_segmentation(tmp_path, num_classes=3)
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="names 2 classes, and num_classes is 3"):
        open_segmentation(tmp_path, num_classes=3)
    (tmp_path / "images" / "val").mkdir()
    with pytest.raises(FileNotFoundError, match="the masks of"):
        open_segmentation(tmp_path, "val")
    (tmp_path / "masks" / "val").mkdir()
    with pytest.raises(UserError, match="no images for the val split"):
        open_segmentation(tmp_path, "val")


# Masks --------------------------------------------------------------------------------------------------------------


def test_indices_are_read_as_they_are_stored() -> None:
    values = blocks(24, 32, (0, 1, 2, 3, 255))
    palette = Image.fromarray(values).convert("P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    assert palette.convert("L").tobytes() != values.tobytes()
    wide = Image.fromarray(values.astype(np.uint16))
    for data in (encode(palette, "PNG"), encode(palette, "BMP"), encode(wide, "PNG"), values, palette):
        assert np.array_equal(Mask(data, TABLE).labels("picture"), values)
    bits = Image.fromarray(values == 1)
    assert np.array_equal(Mask(encode(bits, "PNG"), TABLE).labels("picture"), values == 1)


@pytest.mark.parametrize(("data", "words"), [
    (b"", "empty"),
    (encode(Image.fromarray(blocks(24, 32, (0, 1))), "PNG")[:60], "mask"),
    (BadImage("row", "the row holds no mask"), "no mask"),
], ids=["empty", "truncated", "none"])  # fmt: skip
def test_bad_masks_make_bad_images(data: Data, words: str) -> None:
    with pytest.raises(BadImage, match=words) as caught:
        Mask(data, TABLE).labels("picture")
    assert caught.value.name == "picture"


@pytest.mark.parametrize(("data", "words"), [
    (encode(noise(24, 32), "PNG"), "is a picture of mode RGB"),
    (encode(noise(24, 32).convert("RGBA"), "PNG"), "is a picture of mode RGBA"),
    (encode(noise(24, 32).convert("LA"), "PNG"), "is a picture of mode LA"),
    (encode(Image.fromarray(np.zeros((24, 32), np.float32)), "TIFF"), "is a picture of mode F"),
    (encode(Image.fromarray(np.full((24, 32), 7, np.uint8)), "PNG"), "the value 7 in 768 pixels, which is none of"),
    (np.arange(768).reshape(24, 32) % 8, "the value 5 in 96 pixels (and 2 other values in 192), which"),
    (encode(Image.fromarray(np.full((24, 32), 257, np.uint16)), "PNG"), "the value 257 in 768 pixels"),
    (np.full((24, 32), -1), "the value -1 in 768 pixels"),
], ids=["colours", "alpha", "grey alpha", "float", "value", "values", "wide value", "negative"])  # fmt: skip
def test_masks_that_say_something_else_stop_the_run(data: Data, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^the mask of picture .*{re.escape(words)}"):
        Mask(data, TABLE).labels("picture")
    if isinstance(data, bytes):
        (tmp_path / "m.png").write_bytes(data)
        with pytest.raises(UserError, match=f"the mask {tmp_path / 'm.png'} of picture .*{re.escape(words)}"):
            Mask(tmp_path / "m.png", TABLE).labels("picture")


@pytest.mark.parametrize(("data", "values"), [
    (png(1, 0, [b"\x50", b"\xa0"]), [[0, 1, 0, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0, 0]]),
    (png(2, 0, [b"\x1b"]), [[0, 1, 2, 3]]),
    (png(4, 0, [b"\x01\x24"]), [[0, 1, 2, 4]]),
    *((tiff(8, photometric, bytes([0, 1, 2, 255])), [[0, 1, 2, 255]]) for photometric in (0, 1)),
    *((tiff(4, photometric, b"\x01\x24"), [[0, 1, 2, 4]]) for photometric in (0, 1)),
    *((tiff(1, photometric, b"\x50"), [[0, 1, 0, 1, 0, 0, 0, 0]]) for photometric in (0, 1)),
    *((tiff(16, photometric, bytes([2, 0, 255, 0])), [[2, 255]]) for photometric in (0, 1)),
])  # fmt: skip
def test_few_bits_and_white_zeros_are_numbers_as_stored(data: bytes, values: list[list[int]]) -> None:
    assert np.array_equal(Mask(data, TABLE).labels("picture"), np.array(values))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_of_few_colours(bits: int) -> None:
    values = blocks(24, 32, range(min(5, 2**bits)))
    palette = Image.fromarray(values).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9, 8, 8, 8])
    data = encode(palette, "PNG", bits=bits)
    assert np.array_equal(Mask(data, TABLE).labels("picture"), values)


def test_a_mask_file_is_named_and_not_too_large(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    path.write_bytes(encode(Image.fromarray(blocks(24, 32, (0, 1))), "PNG"))
    with pytest.raises(BadImage, match=r"mask\.png.*max_pixels"):
        Mask(path, TABLE).labels("picture", max_pixels=700)


@pytest.mark.parametrize("size", [(24, 31), (25, 32), (32, 24)])
def test_a_mask_of_another_size_makes_a_bad_image(size: tuple[int, int]) -> None:
    made = item(24, 32)._replace(label=Mask(np.zeros(size, np.uint8), TABLE))
    for prepare in (
        SegmentationTest((16, 16), MEAN, STD).prepare,
        lambda made: SegmentationViews(MEAN, STD).augment(made, [(16, 16)], random.Random(0)),
    ):
        with pytest.raises(BadImage, match=f"its marks are for {size[1]}x{size[0]} pixels, and the image has 32x24"):
            prepare(made)


# Training views -----------------------------------------------------------------------------------------------------


def agreement(view: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the labelled pixels whose colour is that of their class, give or take what lies between blocks."""
    colours = (view * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    inside = labels != IGNORED
    return (colours[:, inside] - 50 * labels[inside]).abs().lt(20).float().mean().item()


@pytest.mark.parametrize("separate", [True, False])
def test_labels_stay_on_their_pixels(separate: bool) -> None:
    views = SegmentationViews(MEAN, STD, photometric=False, separate_aug=separate)
    sizes = [(64, 64), (48, 40)]
    items = [item(seed=seed, width=60 + seed) for seed in range(8)]
    samples = [views.augment(one, sizes, random.Random(number)) for number, one in enumerate(items)]
    images, labels = views.collate(items, samples, sizes)
    assert [view.shape for view in images] == [(8, 3, 64, 64), (8, 3, 48, 40)]
    assert [target.shape for target in labels] == [(8, 64, 64), (8, 48, 40)]
    assert images[0].dtype == torch.float32
    assert labels[0].dtype == labels[1].dtype == torch.uint8
    for view, target in zip(images, labels, strict=True):
        for one, marks in zip(view, target, strict=True):
            assert agreement(one, marks) > 0.75
        assert agreement(view[0].flip(-1), target[0]) < 0.6
    assert len(samples[0]) == (2 if separate else 1)
    if not separate:
        assert (labels[1][:, ::12, ::10] == labels[0][:, 1::16, 1::16]).float().mean() > 0.9


def test_small_pictures_are_padded_at_the_right_and_bottom_with_nothing() -> None:
    views = SegmentationViews(MEAN, STD, scale=(0.5, 0.5), hflip=0)
    sample = views.augment(item(40, 60), [(64, 64)], random.Random(0))
    assert sample[0][0].shape == (32, 48, 3)  # short side 64, halved
    (view,), (labels,) = views.collate([item()], [sample], [(64, 64)])
    assert (view[0, :, 32:] == 0).all()
    assert (view[0, :, :, 48:] == 0).all()
    assert (labels[0, 32:] == IGNORED).all()
    assert (labels[0, :, 48:] == IGNORED).all()
    assert torch.equal(view[:, :, :32, :48], normalize(to_batch([sample[0][0]]), MEAN, STD))
    assert (labels[0, :32, :48] != IGNORED).all()


def test_scale_and_longest_side() -> None:
    wide = item(40, 400)
    for scale, longest, expected in ((1, 4.0, (26, 64)), (2, 4.0, (51, 64)), (1, 100.0, (64, 64))):
        views = SegmentationViews(MEAN, STD, scale=(scale, scale), longest=longest)
        assert views.augment(wide, [(64, 64)], random.Random(0))[0][1].shape == expected
    drawn = [
        SegmentationViews(MEAN, STD).augment(item(64, 64), [(64, 64)], random.Random(i))[0][1].shape[0]
        for i in range(200)
    ]
    assert min(drawn) < 35
    assert 50 < sum(side < 64 for side in drawn) < 90  # a third of the range from 0.5 to 2 makes smaller pictures


def test_no_class_fills_a_crop_if_that_can_be_helped() -> None:
    labels = np.zeros((200, 200), np.uint8)
    labels[:, 100:] = 1
    labels[:30] = IGNORED
    picture = Item("halves", np.zeros((200, 200, 3), np.uint8), Mask(labels, TABLE))

    def shares(largest_share: float) -> np.ndarray:
        views = SegmentationViews(MEAN, STD, scale=(2, 2), largest_share=largest_share)
        crops = [views.augment(picture, [(50, 50)], random.Random(number))[0][1] for number in range(60)]
        counts = [np.bincount(crop[crop != IGNORED], minlength=2) for crop in crops]
        return np.array([count.max() / max(count.sum(), 1) for count in counts])

    assert (shares(1.0) > 0.75).mean() > 0.4
    assert (shares(0.75) > 0.75).mean() < 0.15
    one_class = Item("plain", np.zeros((200, 200, 3), np.uint8), Mask(np.zeros((200, 200), np.uint8), TABLE))
    assert SegmentationViews(MEAN, STD).augment(one_class, [(50, 50)], random.Random(0))


def test_views_come_from_the_generator_alone() -> None:
    views = SegmentationViews(MEAN, STD)
    state = random.getstate(), torch.random.get_rng_state()
    first, again, other = (views.augment(item(), [(64, 64), (32, 32)], random.Random(seed)) for seed in (1, 1, 2))
    assert all(
        np.array_equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert not np.array_equal(first[0][1], other[0][1])
    assert random.getstate() == state[0]
    assert torch.equal(torch.random.get_rng_state(), state[1])
    assert pickle.loads(pickle.dumps(views)) == views


def test_a_large_jpeg_is_decoded_smaller() -> None:
    labels = blocks(1200, 1600, (0, 1, 2))
    jpeg = encode(Image.fromarray(np.stack([50 * labels] * 3, -1)))
    views = SegmentationViews(MEAN, STD, scale=(1, 1), photometric=False, hflip=0)
    small, large = (views.augment(Item("big", data, Mask(labels, TABLE)), [(96, 96)], random.Random(0))[0]
                    for data in (jpeg, np.asarray(Image.open(__import__("io").BytesIO(jpeg)))))  # fmt: skip
    assert np.array_equal(small[1], large[1])
    assert np.abs(small[0].astype(int) - large[0]).mean() < 2


class Draws:
    """A generator that gives what it is told: `chances` one by one, and `values` for every range."""

    def __init__(self, chances: Iterable[int], values: dict[str, float]) -> None:
        self.chances, self.values = list(chances), values

    def random(self) -> float:
        return 0.0 if self.chances.pop(0) else 0.9

    def uniform(self, low: float, high: float) -> float:
        return self.values[{-32: "brightness", 0.5: "factor", -0.1: "hue"}[low]]


def test_jitter_does_what_it_says() -> None:
    image = noise(16, 16, 3)
    pixels = np.asarray(image).astype(float)

    def jittered(*chances: int, picture: Image.Image = image, **values: float) -> np.ndarray:
        draws = cast(random.Random, Draws(chances, values))
        return np.asarray(jitter_colours(picture, draws)).astype(float)

    assert np.array_equal(jittered(0, 0, 0, 0, 0), pixels)
    assert np.array_equal(jittered(1, 0, 0, 0, 0, brightness=20), np.minimum(pixels + 20, 255))
    for late in (0, 1):
        assert np.array_equal(jittered(0, 1, 0, 0, late, factor=0.5), np.rint(pixels * 0.5))
    bright = np.minimum(pixels + 32, 255)
    assert np.array_equal(jittered(1, 1, 0, 0, 0, brightness=32, factor=1.5), np.minimum(np.rint(bright * 1.5), 255))
    red, green, blue = jittered(0, 0, 0, 1, 0, hue=0.1)[5, 5] / 255
    expected = colorsys.rgb_to_hsv(*pixels[5, 5] / 255)
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    assert abs((hue - expected[0] - 0.1 + 0.5) % 1 - 0.5) < 0.02
    assert abs(saturation - expected[1]) < 0.02
    assert value == pytest.approx(expected[2], abs=0.01)
    dull = jittered(0, 0, 1, 0, 0, factor=0.5)[5, 5]
    assert colorsys.rgb_to_hsv(*dull / 255)[1] == pytest.approx(expected[1] / 2, abs=0.02)
    grey = image.convert("L")
    assert np.array_equal(jittered(0, 0, 1, 1, 0, picture=grey, factor=0.5, hue=0.1), np.asarray(grey))


def test_impossible_settings_are_refused() -> None:
    for setting in ({"scale": (2, 0.5)}, {"longest": 0.5}, {"largest_share": 0}, {"hflip": 2}):
        with pytest.raises(UserError, match=next(iter(setting))):
            SegmentationViews(MEAN, STD, **setting)
    for setting in ({"longest": 0.5}, {"divisor": 0}):
        with pytest.raises(UserError, match=next(iter(setting))):
            SegmentationTest((64, 64), MEAN, STD, **setting)
    with pytest.raises(UserError, match="size"):
        SegmentationTest((0, 64), MEAN, STD)


# Tests and loaders --------------------------------------------------------------------------------------------------


def test_whole_images_keep_their_ratio_and_their_labels() -> None:
    test = SegmentationTest((64, 64), MEAN, STD, divisor=32)
    items = [item(40, 60), item(60, 40), item(40, 60, seed=1), item(80, 120)]
    batches, _ = prepare_batches(test, items)
    assert [tuple(batch.inputs.shape) for batch in batches] == [(2, 3, 64, 96), (1, 3, 96, 64), (1, 3, 64, 96)]
    assert [tuple(batch.truth.shape) for batch in batches] == [(2, 40, 60), (1, 60, 40), (1, 80, 120)]
    assert np.array_equal(batches[0].truth[1], items[2].label.data)
    plain = SegmentationTest((64, 64), MEAN, STD)
    assert plain.prepare(item(40, 61)).pixels.shape == (64, 98, 3)
    assert SegmentationTest((32, 64), MEAN, STD).prepare(item(40, 100)).pixels.shape == (26, 64, 3)
    same = SegmentationTest((40, 40), MEAN, STD)
    assert np.array_equal(same.prepare(items[0]).pixels, as_a(np.ndarray, items[0].data))
    assert pickle.loads(pickle.dumps(test)) == test


def test_loaders_take_them_and_leave_out_what_is_broken(tmp_path: Path) -> None:
    write(tmp_path, "images", "masks", [f"{number:02d}" for number in range(20)])
    (tmp_path / "masks" / "03.png").write_bytes(encode(Image.fromarray(blocks(24, 31, (0, 1))), "PNG"))
    source = open_segmentation(tmp_path, "all", num_classes=3)
    views = SegmentationViews(source.mean, source.std)
    loader = TrainLoader(source, SizeSchedule([(32, 32), (16, 24)]), views, 4, max_bad_fraction=0.1)
    batches = list(loader.epoch(0))
    assert [tuple(view.shape) for view in batches[0].views] == [(4, 3, 32, 32), (4, 3, 16, 24)]
    assert [tuple(labels.shape) for labels in batches[0].targets] == [(4, 32, 32), (4, 16, 24)]
    assert list(loader.bad) == ["images/03.jpg"]
    assert "31x24" in loader.bad["images/03.jpg"]
    tests = EvalLoader(source, SegmentationTest((32, 32), source.mean, source.std), 8)
    assert sum(len(batch.names) for batch in tests) == 19
    assert len(tests.bad) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_stop_at_a_value_without_a_meaning(tmp_path: Path, workers: int) -> None:
    write(tmp_path, "images", "masks", [f"{number:03d}" for number in range(200)], size=(8, 8))
    (tmp_path / "masks" / "003.png").write_bytes(encode(Image.fromarray(blocks(8, 8, (9,))), "PNG"))
    source = open_segmentation(tmp_path, "all", num_classes=3)
    loader = TrainLoader(source, SizeSchedule([(8, 8)]), SegmentationViews(source.mean, source.std), 4, workers=workers)
    tests = EvalLoader(source, SegmentationTest((8, 8), source.mean, source.std), 8, workers)
    for batches in (loader.epoch(0), tests):
        with pytest.raises(UserError, match=r"^the mask .*/masks/003\.png of images/003\.jpg holds the value 9 in 64 "):
            list(batches)


def test_black_and_white_masks_need_their_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """255 is ignored unless it is told to be a class."""
    write(tmp_path, "images", "masks", [f"{number:03d}" for number in range(40)], values=(0, 255), size=(16, 16))
    with pytest.raises(
        UserError, match=r"^'0' alone has labelled pixels in the 40 masks .*'1' has none.*mask_values=0,255"
    ):
        check_masks(open_segmentation(tmp_path, "all", num_classes=2))
    source = open_segmentation(tmp_path, "all", mask_values=[0, 255])
    check_masks(source)
    assert not caplog.text
    assert np.array_equal(load(source, 3), blocks(16, 16, (0, 255), 3) // 255)
    swapped = open_segmentation(tmp_path, "all", mask_values=[255, 0])
    assert np.array_equal(load(swapped, 3), 1 - blocks(16, 16, (0, 255), 3) // 255)
    third = open_segmentation(tmp_path, "all", mask_values=[0, 255, 7])
    check_masks(third)
    assert "no pixel is labelled '2' in the 40 of 40 masks" in caplog.text
    third.use_labels(["2", "1", "0"])
    assert np.array_equal(load(third, 3), 2 - blocks(16, 16, (0, 255), 3) // 255)
    for values in ([0, 0], [0, 256], [-1, 0], [0, 1, 2]):
        with pytest.raises(UserError, match="must be 2 different numbers from 0 to 255"):
            open_segmentation(tmp_path, "all", num_classes=2, mask_values=values)
    with pytest.raises(UserError, match="reduce_zero_label off"):
        open_segmentation(tmp_path, "all", mask_values=[0, 255], reduce_zero_label=True)


def test_classes_are_sought_in_some_masks_and_in_all_before_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "images", "masks", [f"{number:02d}" for number in range(30)], values=(0,), size=(8, 8))
    order = np.random.default_rng(0).permutation(30)
    monkeypatch.setattr(segmentation, "LOOKED_AT", 5)
    source = open_segmentation(tmp_path, "all", num_classes=3)
    with pytest.raises(UserError, match="'0' alone has labelled pixels in the 30 masks"):
        check_masks(source)
    (tmp_path / "masks" / f"{order[20]:02d}.png").write_bytes(encode(Image.fromarray(blocks(8, 8, (1,))), "PNG"))
    check_masks(source)
    assert "no pixel is labelled '2' in the 21 of 30 masks" in caplog.text
    (tmp_path / "masks" / f"{order[0]:02d}.png").write_bytes(b"damaged")
    (tmp_path / "masks" / f"{order[1]:02d}.png").write_bytes(encode(Image.fromarray(blocks(8, 8, (2,))), "PNG"))
    caplog.clear()
    check_masks(source)
    assert "no pixel is labelled '1' in the 5 of 30 masks" in caplog.text


def test_pictures_may_share_a_mask_by_links(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "masks" / "none.png")
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{number}.jpg")
        (tmp_path / "masks" / f"{number}.png").symlink_to("none.png")
    source = open_segmentation(tmp_path, "all", num_classes=2)
    assert [source.item(i).label.data.name for i in range(3)] == ["0.png", "1.png", "2.png"]
