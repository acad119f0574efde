from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from anyres.data import ImageTest, Item, MapSource, StreamSource
from anyres.data.decode import open_picture
from anyres.data.kept import KeptImages, spread
from anyres.errors import UserError


class Photos(MapSource):
    """Pictures of 100 by 140 pixels; how often each was read is counted."""

    def __init__(self, kind: str = "JPEG", labels: tuple[int, ...] = (0, 0, 1)) -> None:
        super().__init__("photos", ["a", "b", "c"])
        self.labels, self.read = labels, Counter[int]()
        rng = np.random.default_rng(0)
        self.files = []
        for _ in labels:
            buffer = io.BytesIO()
            small = Image.fromarray(rng.integers(0, 255, (10, 14, 3), dtype=np.uint8))
            small.resize((140, 100)).save(buffer, kind)
            self.files.append(buffer.getvalue())

    def __len__(self) -> int:
        return len(self.labels)

    def _item(self, index: int) -> Item:
        self.read[index] += 1
        return Item(str(index), self.files[index], self.labels[index])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("room", [0, 100_000, 1 << 20])
def test_kept_images_give_the_pixels_of_decoding_again(kind: str, room: int) -> None:
    source, kept = Photos(kind), KeptImages(room)
    for side in (8, 24, 90, 24, 200, 8, 48):  # at 1/8, 1/4 and at full size
        transform = ImageTest((side, side), source.mean, source.std)
        for index in range(len(source)):
            plain = transform.prepare(source.item(index))
            assert np.array_equal(transform.prepare(kept.item(source, index)).pixels, plain.pixels)
    assert kept.left >= 0


def test_an_image_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source, kept = Photos(), KeptImages()
    decoded: list[Image.Image] = []
    load = ImageFile.ImageFile.load

    def counted(image: ImageFile.ImageFile) -> object:
        decoded.append(image)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    transform = ImageTest((90, 90), source.mean, source.std)
    for _ in range(3):
        transform.prepare(kept.item(source, 0))
    assert len({id(image) for image in decoded}) == 1
    assert source.read[0] == 1


@pytest.mark.parametrize("scale", [0.01, 0.12, 0.125, 0.2, 0.25, 0.3, 0.49, 0.5, 0.51, 1.0, 3.0])
@pytest.mark.parametrize("size", [(140, 100), (17, 9), (31, 64)])
def test_a_reduction_is_what_the_decoder_does(scale: float, size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "JPEG")
    with open_picture(buffer.getvalue(), "x") as picture:
        part = picture.reduction(scale)
        assert picture.decode(scale).size == tuple(-(-side // part) for side in size)


def test_a_share_of_the_items_has_every_class_in_proportion() -> None:
    labels = tuple([0] * 40 + [1] * 20 + [2] * 4)
    source = Photos(labels=labels)
    chosen = spread(source, 16, seed=1)
    assert chosen == sorted(set(chosen))
    assert Counter(labels[index] for index in chosen) == {0: 10, 1: 5, 2: 1}
    assert chosen == spread(source, 16, seed=1)
    assert chosen != spread(source, 16, seed=2)
    assert spread(source, 100) == list(range(64))


def test_a_stream_has_no_share(tmp_path: Path) -> None:
    class Stream(StreamSource):
        def _items(self, epoch: int | None, seed: int, rank: int, world: int):  # type: ignore[no-untyped-def]
            return iter(())

    with pytest.raises(UserError, match="images=5 needs data that can be read in any order"):
        spread(Stream("s", ["a"]), 5)
