import dataclasses
import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.transforms import functional as TF

from anyres.data import Augmentation, Item, evaluation_views, normalize, to_batch
from anyres.data.decode import Picture, open_picture
from anyres.data.seeding import generator
from anyres.data.views import augment, draw_box, finish
from anyres.errors import UserError
from tests.data.pictures import encode, noise

PLAIN = Augmentation(crop_scale=(1, 1), crop_ratio=(1, 1), hflip=0, auto_augment=None, color_jitter=0, erasing=0)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def item(image: Image.Image, kind: str = "PNG") -> Item:
    return Item("x", encode(image, kind), 0)


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (257, 257), (100, 37), (8, 8), (1, 1), (1, 500)])
@pytest.mark.parametrize("side", [16, 97, 224])
def test_square_evaluation_is_the_published_one(shape: tuple[int, int], side: int) -> None:
    image = noise(shape[0], shape[1], side)
    (got,), _ = evaluation_views(item(image), [(side, side)], 3)
    resized = TF.resize(image, int(side / 0.875), interpolation=TF.InterpolationMode.BICUBIC)
    expected = np.asarray(TF.center_crop(resized, [side, side]))
    assert np.abs(got.astype(int) - expected).max() <= 1  # fixed-point weights may round differently
    assert (got != expected).mean() < 0.01


@pytest.mark.parametrize("size", [(96, 170), (170, 96), (64, 512)])
@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (90, 500)])
def test_other_shapes_cover_their_box_and_crop_the_centre(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = noise(*shape)
    box = [int(side / 0.875) for side in size]
    scale = max(box[0] / shape[0], box[1] / shape[1])
    resized = TF.resize(
        image, [int(shape[0] * scale + 1e-9), int(shape[1] * scale + 1e-9)], TF.InterpolationMode.BICUBIC
    )
    expected = np.asarray(TF.center_crop(resized, list(size)))
    (got,), _ = evaluation_views(item(image), [size], 3)
    assert got.shape == (*size, 3)
    assert np.abs(got.astype(int) - expected).max() <= 2  # Pillow holds boxes in single precision
    assert (got != expected).mean() < 0.05


def test_evaluation_of_a_shrunk_jpeg_is_close_to_the_published_one() -> None:
    image = noise(1200, 1600)
    (got,), _ = evaluation_views(item(image, "JPEG"), [(96, 96)], 3)
    decoded = Image.open(io.BytesIO(encode(image)))
    resized = TF.resize(decoded, int(96 / 0.875), interpolation=TF.InterpolationMode.BICUBIC)
    expected = np.asarray(TF.center_crop(resized, [96, 96])).astype(int)
    assert np.abs(got - expected).mean() < 1.5


def test_one_decode_serves_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = Image.open

    def opened(*args: Any, **options: Any) -> Image.Image:
        calls.append(1)
        return original(*args, **options)

    monkeypatch.setattr(Image, "open", opened)
    loads = []
    original_load = ImageFile.ImageFile.load

    def counted(self: ImageFile.ImageFile) -> Any:
        if self.tile:
            loads.append(1)
        return original_load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    for separate in (True, False):
        augment(
            item(noise(50, 60), "JPEG"),
            [(32, 32), (24, 24), (16, 16)],
            Augmentation(separate_aug=separate),
            random.Random(0),
            MEAN,
        )
    evaluation_views(item(noise(50, 60), "JPEG"), [(32, 32), (24, 24)], 3)
    assert len(calls) == len(loads) == 3


def test_without_randomness_a_view_is_a_resize() -> None:
    image = noise(40, 40)
    sample = augment(item(image), [(32, 32), (16, 16)], PLAIN, random.Random(0), MEAN)
    views = finish([sample], [(32, 32), (16, 16)], PLAIN, MEAN, STD)
    for view, side in zip(views, (32, 16), strict=True):
        expected = TF.normalize(TF.to_tensor(image.resize((side, side), Image.Resampling.BICUBIC)), MEAN, STD)
        torch.testing.assert_close(view[0], expected)


def test_shared_augmentation_resizes_the_largest_view() -> None:
    aug = Augmentation(hflip=0.5, erasing=0, separate_aug=False)
    sizes = [(32, 48), (16, 24)]
    samples = [augment(item(noise(60, 60, n)), sizes, aug, random.Random(n), MEAN) for n in range(4)]
    assert all(len(sample.pixels) == 1 for sample in samples)
    large, small = finish(samples, sizes, aug, MEAN, STD)
    unit = large * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)
    expected = TF.resize(unit, [16, 24], TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    torch.testing.assert_close(small, normalize(expected, MEAN, STD), atol=1e-4, rtol=1e-4)


def test_separate_augmentation_differs_by_view() -> None:
    aug = Augmentation(auto_augment=None, color_jitter=0, erasing=0)
    sample = augment(item(noise(60, 60)), [(32, 32), (32, 32)], aug, random.Random(1), MEAN)
    first, second = sample.pixels
    assert not np.array_equal(first, second)


def test_crop_boxes_have_the_drawn_area_and_ratio() -> None:
    aug = Augmentation(crop_scale=(0.3, 0.6), crop_ratio=(0.8, 1.25))
    rng = random.Random(0)
    areas, ratios = [], []
    for _ in range(500):
        left, top, right, bottom = draw_box(rng, 100, 80, aug, (50, 100))
        assert 0 <= left < right <= 100
        assert 0 <= top < bottom <= 80
        areas.append((right - left) * (bottom - top) / 8000)
        ratios.append((right - left) / (bottom - top))
    assert 0.3 <= min(areas) < 0.32
    assert 0.58 < max(areas) <= 0.6 + 1e-9
    assert 1.6 - 1e-9 <= min(ratios) < 1.65  # relative to the view's own ratio of 2
    assert max(ratios) > 2.2
    assert draw_box(rng, 1000, 1, Augmentation(), (32, 32)) == pytest.approx((499.3333, 0, 500.6667, 1), abs=1e-3)


def test_training_crop_of_a_shrunk_jpeg_is_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = encode(noise(1200, 1600))
    whole = Image.open(io.BytesIO(jpeg)).convert("RGB")
    decoded = []

    @contextmanager
    def opened(*args: Any) -> Iterator[Picture]:
        with open_picture(*args) as picture:

            def decode(scale: float) -> Image.Image:
                decoded.append(picture.decode(scale))
                return decoded[-1]

            yield Picture(picture.size, decode)

    monkeypatch.setattr("anyres.data.views.open_picture", opened)
    aug = Augmentation(crop_scale=(0.3, 0.9), hflip=0, auto_augment=None, color_jitter=0, erasing=0)
    for seed in range(5):
        shrunk, other = (
            augment(Item("x", data, 0), [(48, 48)], aug, random.Random(seed), MEAN).pixels[0].astype(int)
            for data in (jpeg, whole)
        )
        assert decoded[-2].width <= 800  # a half or less
        assert np.abs(shrunk - other).mean() < 3
        assert np.abs(shrunk[1:] - other[:-1]).mean() > 6  # a row further would be seen


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "rand-m15-n3-mstd1", "augmix-m5-w2", "original", "v0"])
@pytest.mark.parametrize("mean", [MEAN, (0.0,)])
def test_automatic_augmentations_work_in_colour_and_grey(name: str, mean: tuple[float, ...]) -> None:
    aug = Augmentation(auto_augment=name)
    for seed in range(30):
        sample = augment(item(noise(20, 20, seed)), [(16, 24)], aug, generator(seed), mean)
        (view,) = finish([sample], [(16, 24)], aug, mean, (0.5,) * len(mean))
        assert view.shape == (1, len(mean), 16, 24)
        assert view.isfinite().all()


def test_colour_jitter_only_without_automatic_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def jitter(self: object, image: Image.Image) -> Image.Image:
        used.append(1)
        return image

    monkeypatch.setattr("torchvision.transforms.ColorJitter.forward", jitter)
    common: dict[str, Any] = {"hflip": 0, "erasing": 0, "color_jitter": 0.123}
    augment(item(noise(9, 9)), [(8, 8)], Augmentation(auto_augment="rand-m9", **common), random.Random(0), MEAN)
    assert not used
    augment(item(noise(9, 9)), [(8, 8)], Augmentation(auto_augment=None, **common), random.Random(0), MEAN)
    assert used


def test_erasing_happens_after_normalisation_with_normal_noise() -> None:
    aug = Augmentation(crop_scale=(1, 1), crop_ratio=(1, 1), hflip=0, auto_augment=None, color_jitter=0, erasing=1.0)
    sizes = [(64, 64), (64, 64)]
    black = Item("x", np.zeros((64, 64, 3), dtype=np.uint8), 0)
    samples = [augment(black, sizes, aug, random.Random(n), MEAN) for n in range(8)]
    views = finish(samples, sizes, aug, MEAN, STD)
    background = -torch.tensor(MEAN) / torch.tensor(STD)
    for view in views:
        changed = (view != background.view(1, 3, 1, 1)).all(1)
        assert all(0.01 < share < 0.4 for share in changed.float().mean((1, 2)))
        noise_seen = view.permute(0, 2, 3, 1)[changed]
        assert abs(noise_seen.mean()) < 0.1
        assert abs(noise_seen.std() - 1) < 0.1
    assert not torch.equal(*views)  # each replica is erased on its own


def test_to_batch_handles_grey_and_colour() -> None:
    assert to_batch([np.full((2, 3), 255, dtype=np.uint8)] * 4).shape == (4, 1, 2, 3)
    colour = to_batch([np.arange(24, dtype=np.uint8).reshape(2, 4, 3)])
    assert colour.is_contiguous()
    assert colour[0, 1, 1, 2] == pytest.approx((12 + 6 + 1) / 255)


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_scale": (0, 1)},
        {"crop_scale": (0.9, 0.5)},
        {"crop_ratio": (0, 1)},
        {"hflip": 1.5},
        {"erasing": -1},
        {"interpolation": "cubic"},
        {"auto_augment": "rand-x9"},
        {"auto_augment": "magic"},
        {"color_jitter": 2},
    ],
)
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        Augmentation(**wrong)
    assert "\n" not in str(caught.value)


def test_zooming_out_places_the_whole_image_on_the_mean_colour() -> None:
    """A white image on a black mean: the white share of a view is the inverse of the drawn area, and varies in
    place."""
    white = Item("white", Image.new("L", (8, 8), 255), 0)
    zoom = Augmentation(
        crop_scale=(2.0, 2.0),
        crop_ratio=(1.0, 1.0),
        hflip=0,
        auto_augment=None,
        color_jitter=0,
        erasing=0,
        separate_aug=True,
    )
    shares, corners = [], set()
    for seed in range(40):
        pixels = augment(white, [(64, 64)], zoom, random.Random(seed), (0.0,)).pixels[0]
        assert pixels.shape == (64, 64)
        assert set(np.unique(pixels)) <= {0, 255}
        shares.append((pixels == 255).mean())
        rows, columns = np.nonzero(pixels)
        corners.add((rows.min(), columns.min()))
    assert abs(np.mean(shares) - 0.5) < 0.02
    assert len(corners) > 20


@pytest.mark.parametrize(("fill", "colour"), [("mean", (102, 102, 102)), ("border", (10, 200, 30))])
def test_what_surrounds_an_image_that_is_zoomed_out(fill: str, colour: tuple[int, ...]) -> None:
    pixels = np.full((32, 32, 3), 255, dtype=np.uint8)
    pixels[[0, -1]] = pixels[:, [0, -1]] = (10, 200, 30)
    aug = dataclasses.replace(PLAIN, crop_scale=(4, 4), crop_fill=fill)
    [view] = augment(Item("x", pixels, 0), [(32, 32)], aug, random.Random(0), (0.4, 0.4, 0.4)).pixels
    shown = np.unique(view.reshape(-1, 3), axis=0, return_counts=True)
    assert tuple(shown[0][shown[1].argmax()]) == colour
    assert shown[1].max() >= 0.7 * 32 * 32
