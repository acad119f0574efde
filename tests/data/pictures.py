"""Small picture files and folders for the tests of this room."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth-ish RGB noise, so that JPEG keeps it."""
    small = np.random.default_rng(seed).integers(0, 256, (max(height // 4, 1), max(width // 4, 1), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def huge_png(side: int = 20_000) -> bytes:
    """A valid black 1-bit PNG of side x side pixels in a few dozen kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    row = bytes(1 + (side + 7) // 8)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * side)) + chunk(b"IEND", b"")
    )


@cache
def odd_good_files() -> dict[str, bytes]:
    """Unusual files that must decode."""
    picture = noise(24, 20)
    palette = picture.quantize(16)
    transparent = picture.convert("RGBA")
    transparent.putalpha(Image.new("L", transparent.size, 0))
    ramp = np.linspace(0, 65535, 24 * 20).astype(np.uint16).reshape(24, 20)
    return {
        "cmyk.jpg": encode(picture.convert("CMYK")),
        "palette.png": encode(palette, "PNG"),
        "palette_transparent.png": encode(palette, "PNG", transparency=0),
        "palette.gif": encode(palette, "GIF"),
        "sixteen.png": encode(Image.fromarray(ramp), "PNG"),
        "sixteen.tif": encode(Image.fromarray(ramp), "TIFF"),
        "transparent.png": encode(transparent, "PNG"),
        "grey_alpha.png": encode(transparent.convert("LA"), "PNG"),
        "grey.jpg": encode(picture.convert("L")),
        "bits.png": encode(picture.convert("1"), "PNG"),
        "one.png": encode(noise(1, 1), "PNG"),
        "one.jpg": encode(noise(1, 1)),
        "thin.png": encode(noise(1, 3000), "PNG"),
        "web.webp": encode(picture, "WEBP"),
        "bitmap.bmp": encode(picture, "BMP"),
    }


@cache
def bad_files() -> dict[str, bytes]:
    """Files that must be refused."""
    whole = encode(noise(64, 64))
    png = encode(noise(64, 64), "PNG")
    return {
        "truncated.jpg": whole[: len(whole) // 2],
        "truncated.png": png[: len(png) // 2],
        "header_only.jpg": whole[:20],
        "empty.jpg": b"",
        "text.jpg": b"this is no picture at all\n" * 20,
        "huge.png": huge_png(),
        "icon.png": encode(noise(16, 16), "ICO"),  # a format that is not on the list
    }


def write_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 10, side: int = 24) -> Path:
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(each):
            (root / name / f"{number:03d}.jpg").write_bytes(
                encode(noise(side, side + number % 5, 100 * place + number))
            )
    return root


def png(bits: int, kind: int, rows: list[bytes]) -> bytes:
    """A PNG of the colour type `kind` (0 grey, 2 RGB, 6 RGBA) with so many bits, each row's bytes as they are."""
    width = len(rows[0]) * 8 // bits // {0: 1, 2: 3, 6: 4}[kind]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    packed = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(bits: int, photometric: int, row: bytes) -> bytes:
    """A grey TIFF of one row; the photometric interpretation 0 says that white is 0."""
    tags = {256: len(row) * 8 // bits, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1}
    tags |= {279: len(row)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(row)) + row + struct.pack("<H", len(tags)) + entries + bytes(4)
