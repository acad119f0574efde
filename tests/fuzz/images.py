"""Damaged pictures through decoding, masks, views and loaders."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anyres.data import Augmentation, Item, SizeSchedule, TrainLoader
from anyres.data.base import MapSource
from anyres.data.decode import MAX_PIXELS, BadImage, load_indices, open_picture
from anyres.data.listing import EXTENSIONS
from anyres.data.segmentation import Mask
from anyres.data.views import ImageViews
from anyres.errors import UserError
from tests.data.pictures import encode, noise, odd_good_files
from tests.fuzz.core import Failure, Kind
from tests.fuzz.mutators import NUMBERS, mutate_bytes, mutate_file


def pictures() -> list[bytes]:
    """Small files of every format and mode that is opened."""
    picture = noise(40, 56)
    grey = picture.convert("L")
    deep = Image.fromarray((np.asarray(grey).astype(np.uint16) << 8) + 7)
    index = Image.fromarray((np.asarray(grey) // 64).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [noise(24, 24, seed) for seed in range(3)]
    animation: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    layouts: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (picture, "JPEG", {}),
        (picture, "JPEG", {"progressive": True, "exif": exif}),
        (grey, "JPEG", {"optimize": True}),
        (picture, "PNG", {"exif": exif}),
        (picture.quantize(16), "PNG", {}),
        (index, "PNG", {}),
        (deep, "PNG", {}),
        (picture, "WEBP", {}),
        (picture, "WEBP", {"lossless": True, "exif": exif}),
        (frames[0], "WEBP", animation),
        (picture.quantize(64), "GIF", {"interlace": 1}),
        (frames[0], "GIF", animation),
        (picture, "BMP", {}),
        (picture.quantize(16), "BMP", {}),
        (picture, "TIFF", {}),
        (picture, "TIFF", {"compression": "tiff_lzw"}),
        (picture, "TIFF", {"compression": "tiff_adobe_deflate"}),
        (picture, "TIFF", {"compression": "jpeg"}),
        (picture.convert("1"), "TIFF", {"compression": "group4"}),
        (deep, "TIFF", {}),
        (deep, "TIFF", {"compression": "tiff_lzw"}),
        (Image.fromarray(np.linspace(0, 1, 480, dtype=np.float32).reshape(20, 24)), "TIFF", {}),
        (frames[0], "TIFF", animation),
    ]
    return [encode(image, kind, **options) for image, kind, options in layouts] + list(odd_good_files().values())


def mutate_picture(rng: random.Random, samples: list[bytes]) -> bytes:
    data = rng.choice(samples)
    if data.startswith(b"\x89PNG") and rng.random() < 0.5:
        return _mutate_png(rng, data)
    return mutate_file(rng, data, samples)


def _mutate_png(rng: random.Random, data: bytes) -> bytes:
    """Damage inside the chunks, with checksums that are right, so that it is read."""
    chunks: list[tuple[bytes, bytes]] = []
    at = 8
    while at + 8 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(chunks))
        name, content = chunks[place]
        way = rng.randrange(6)
        if way == 0:
            chunks.insert(rng.randrange(len(chunks) + 1), chunks[place])
        elif way == 1 and len(chunks) > 1:
            del chunks[place]
        elif way == 2 and name == b"IDAT":
            try:
                raw = zlib.decompressobj().decompress(content, 1 << 20)
            except zlib.error:  # damaged in an earlier round
                continue
            raw = mutate_bytes(rng, raw)
            chunks[place] = name, zlib.compress(raw * rng.choice((1, 1, 200)))
        elif name == b"IHDR":
            field = rng.randrange(7)
            values = list(struct.unpack(">IIBBBBB", content[:13].ljust(13, b"\0")))
            values[field] = rng.choice(NUMBERS) % (2**32 if field < 2 else 256)
            chunks[place] = name, struct.pack(">IIBBBBB", *values)
        else:
            chunks[place] = rng.choice((name, b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"acTL")), mutate_bytes(rng, content)
    packed = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return data[:8] + b"".join(packed)


class Pictures(MapSource):
    """Encoded pictures in memory, with the class 0."""

    def __init__(self, files: list[bytes], in_chans: int) -> None:
        super().__init__("pictures", ["a", "b"], in_chans)
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def _item(self, index: int) -> Item:
        return Item(f"{index}", self.files[index], 0)


def case(rng: random.Random, samples: list[bytes]) -> str:
    if rng.random() < 0.01:
        return _load(rng, samples)
    data: Any = mutate_picture(rng, samples)
    if rng.random() < 0.1:
        path = Path(f"x{rng.choice(sorted(EXTENSIONS))}")
        path.write_bytes(data)
        data = path
    use = rng.random()
    try:
        if use < 0.75:
            _check_image(rng, data)
        elif use < 0.9:
            indices = load_indices(data, "x")
            if indices.ndim != 2 or indices.dtype.kind not in "ui" or indices.size > MAX_PIXELS:
                raise Failure(f"numbers {indices.shape} {indices.dtype}")
        else:
            table = np.full(256, -1, dtype=np.int16)
            table[:5] = range(5)
            Mask(data, table).labels("x")
    except BadImage as bad:
        if not bad.reason or "\n" in bad.reason or len(bad.reason) > 1000:
            raise Failure(f"the reason {bad.reason[:1000]!r}") from bad
        return "refused"
    except UserError:  # what it holds is not what was said that it holds
        return "refused"
    return "worked"


def _check_image(rng: random.Random, data: Any) -> None:
    in_chans = rng.choice((1, 3))
    scale = rng.choice((1.0, 0.5, 0.1))
    with open_picture(data, "x", in_chans) as picture:
        image = picture.decode(scale)
    pixels = np.asarray(image)
    if (
        pixels.dtype != np.uint8
        or pixels.ndim != (2 if in_chans == 1 else 3)
        or image.width * image.height > MAX_PIXELS
    ):
        raise Failure(f"a picture {pixels.shape} of {pixels.dtype}")


def _load(rng: random.Random, samples: list[bytes]) -> str:
    """A batch of whole and damaged files as training sees them."""
    source = Pictures(
        [mutate_picture(rng, samples) if rng.random() < 0.5 else rng.choice(samples) for _ in range(8)], 3
    )
    views = ImageViews(Augmentation(), source.mean, source.std)
    loader = TrainLoader(source, SizeSchedule([(24, 16), (12, 12)]), views, 4, max_bad_fraction=rng.choice((0.1, 1.0)))
    try:
        for batch in loader.epoch(0):
            if [view.shape for view in batch.views] != [(4, 3, 24, 16), (4, 3, 12, 12)]:
                raise Failure(f"views {[view.shape for view in batch.views]}")
    except UserError:
        return "refused"
    return "worked"


KIND = Kind("images", case, lambda _: pictures(), short=2000, long=100_000, batch=500, seconds=20, megabytes=1500)
