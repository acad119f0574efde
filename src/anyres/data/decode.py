"""Image files to pixels, safely: few formats, a pixel limit before decoding, one exception for all that is wrong."""

from __future__ import annotations

import heapq
import math
import os
import stat
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from anyres.data.schedule import Size
from anyres.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
MAX_PIXELS = 64_000_000
INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")
SHALLOW = 14
"""A picture of 16 bits that uses as many of them, or fewer, is dark or has fewer bits: a person has to say which."""

ORIENTATION = 0x0112  # EXIF tag
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE = 258, 262, 281  # TIFF tags
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


class BadImage(Exception):  # noqa: N818 - the image is bad, whoever asks; most callers carry on
    """An image that cannot be used: `name` says which, `reason` says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it survives the way from a worker process
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Deep(NamedTuple):
    """A picture whose numbers, where they have more than 8 bits, go up to 2**bit_depth - 1."""

    data: bytes | Path | np.ndarray | Image.Image | BadImage
    bit_depth: int


class Drawing(NamedTuple):
    """An image that is drawn when it is needed: `draw(scale)` gives an "RGB" image of about scale x size, never
    smaller."""

    size: Size
    """(height, width) at scale 1, the finest."""
    draw: Callable[[float], Image.Image]


Data = bytes | Path | np.ndarray | Image.Image | Drawing | BadImage | Deep
"""What a source hands over: an encoded file, its path, uint8 pixels, a decoded image, how to draw one, or why there is
none."""


def with_depth(data: Data, bit_depth: int | None) -> Data:
    """Say what is known of a picture's numbers: nothing with None. Raises UserError for less than 1 or more than 32."""
    if bit_depth is None or isinstance(data, Deep):
        return data
    if not 1 <= bit_depth <= 32:
        raise UserError(f"bit_depth is {bit_depth}; it must be from 1 to 32")
    return Deep(data, bit_depth)


class Picture(NamedTuple):
    """An image whose size is known and that is not decoded yet."""

    size: Size
    """(height, width) of what `decode` gives at scale 1."""
    decode: Callable[[float], Image.Image]
    """The image, for whoever needs it at `scale` x size: a JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the
    time, so it may be smaller than its size, but never smaller than asked for."""


@contextmanager
def open_picture(
    data: Data, name: str, in_chans: int = 3, max_pixels: int = MAX_PIXELS, marked: Size | None = None
) -> Iterator[Picture]:
    """An image of mode "L" (`in_chans` 1) or "RGB" (`in_chans` 3), upright by EXIF's orientation, to be decoded once.

    `marked` is the size (height, width) of what is marked in the picture, which then is decoded as it was when it was
    marked: not turned if it is stored at that size, else upright if it has that size so. Where both have it, as in
    squares, it is not turned either: tools that write masks and COCO's annotations refer to the pixels as stored.

    Transparency is laid over white. Of several frames or pages the first is taken. What has more than 8 bits is scaled
    to 8 by the range of its numbers: 2**bit_depth - 1 (see `with_depth`), else what a TIFF says of itself (a
    BitsPerSample of 12, say, or the MaxSampleValue of a number of bits), else 65535, and 1 for floats. PNG's sBIT
    changes nothing: such files are scaled to 16 bits all the same. Content never decides.

    Raises BadImage for whatever is wrong with the file, also for more than `max_pixels` pixels (checked before
    decoding), and for a size that is not the one that was marked. Raises UserError where the range has to be told: for
    numbers beyond it, and for a picture of 16 bits that uses 14 or fewer of them.
    """
    bit_depth = None
    if isinstance(data, Deep):
        data, bit_depth = data
    if isinstance(data, BadImage):
        raise data
    if isinstance(data, bytes | Path):
        with _opened(data, name, max_pixels) as image:
            yield _picture(image, name, in_chans, bit_depth, marked)
        return
    if isinstance(data, Drawing):
        draw = data.draw
        yield Picture(data.size, lambda scale: _to_mode(draw(scale), in_chans, name, None))
        return
    image = Image.fromarray(data) if isinstance(data, np.ndarray) else data
    _check_pixels(image, name, max_pixels)
    _shown_upright(image.size, 1, marked, name)

    def decode(scale: float) -> Image.Image:
        with _reading(name):
            return _to_mode(image, in_chans, name, bit_depth)

    yield Picture((image.height, image.width), decode)


def load_image(
    data: Data, name: str, in_chans: int = 3, max_pixels: int = MAX_PIXELS, marked: Size | None = None
) -> Image.Image:
    """All of an image; see `open_picture`."""
    with open_picture(data, name, in_chans, max_pixels, marked) as picture:
        return picture.decode(1.0)


def load_indices(data: Data, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode the numbers that an image stores, (H, W) integers: the indices of a palette, the values of a grey image of
    1 to 16 bits; not turned, whatever the image says of its orientation. Raises BadImage for whatever is wrong with the
    file, and UserError for one with colours."""
    if isinstance(data, Deep):
        data = data.data  # numbers of classes are not scaled
    if isinstance(data, BadImage):
        raise data
    if isinstance(data, np.ndarray):
        return data
    with nullcontext(data) if isinstance(data, Image.Image) else _opened(data, name, max_pixels) as image:
        if image.mode not in INDEX_MODES:
            raise UserError(
                f"{name} is a picture of mode {image.mode}, but one number is needed for each pixel: save it with a"
                " palette or in grey"
            )
        layout = _layout(image)  # forgotten when the pixels are there
        with _reading(name):
            indices = np.asarray(_stored(image)[0])
    if indices.dtype == bool:
        indices = indices.astype(np.uint8)
    if image.mode in ("1", "L"):  # Pillow turns values that count from white over, and stretches those of 2 and 4 bits
        indices = (1 if image.mode == "1" else 255) - indices if "I" in layout else indices
        indices = indices // {"2": 85, "4": 17}.get(layout[:1], 1)
    return indices


def _layout(image: Image.Image) -> str:
    """How an opened file that is not decoded yet stores a pixel, in Pillow's words: "16B" of "RGB;16B"."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else ""
    mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return str(mode).partition(";")[2]


@contextmanager
def _opened(data: bytes | Path, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """An image file that is not too large, not decoded yet."""
    with _reading(name):
        if isinstance(data, Path) and data.exists() and not data.is_file():  # a pipe would be waited for
            raise BadImage(name, "it is no regular file")
        handle = BytesIO(data) if isinstance(data, bytes) else data.open("rb")
    with handle:
        with _reading(name):
            if not handle.read(1):
                raise BadImage(name, "the file is empty")
            handle.seek(0)
            image: Image.Image = Image.open(handle, formats=FORMATS)
        _check_pixels(image, name, max_pixels)
        yield image


def _picture(opened: Image.Image, name: str, in_chans: int, bit_depth: int | None, marked: Size | None) -> Picture:
    """An opened file."""
    with _reading(name):
        wide_colours = opened.mode.startswith("RGB") and "16" in _layout(opened)
        _check_black(opened)
        depth = bit_depth or _stated_depth(opened)
        draftable = opened.format in ("JPEG", "MPO")
        stored, orientation = (opened, _orientation(opened)) if draftable else _stored(opened)
        width, height = stored.size
        upright = _shown_upright(stored.size, orientation, marked, name)

    def decode(scale: float) -> Image.Image:
        with _reading(name):
            if draftable:
                # "L" takes the luminance as it is stored, so the colour planes are never computed.
                least = (math.ceil(width * min(scale, 1.0)), math.ceil(height * min(scale, 1.0)))
                stored.draft("L" if in_chans == 1 else None, least)
            stored.load()
            if wide_colours:
                _check_colours(stored, name, depth)
            turned = stored.transpose(UPRIGHT[orientation]) if upright and orientation in UPRIGHT else stored
            return _to_mode(turned, in_chans, name, depth)

    return Picture((width, height) if upright and orientation in SIDEWAYS else (height, width), decode)


def _orientation(image: Image.Image) -> int:
    orientation = image.getexif().get(ORIENTATION, 1)
    return orientation if orientation in UPRIGHT else 1


def _stored(image: Image.Image) -> tuple[Image.Image, int]:
    """An opened image decoded, its pixels as they are stored, and its orientation: of some formats it is only sure
    after decoding, and Pillow turns TIFFs by itself."""
    before = _orientation(image)
    image.load()
    after = _orientation(image)
    if before == 1 or before == after:
        return image, after
    return image.transpose(UPRIGHT[{6: 8, 8: 6}.get(before, before)]), before


def _shown_upright(size: tuple[int, int], orientation: int, marked: Size | None, name: str) -> bool:
    """Whether a picture that is stored at `size` (width, height) was upright when it was marked; so is an unmarked one.
    Raises BadImage where neither has the size that was marked."""
    if marked is None:
        return True
    if marked == size[::-1]:
        return False
    if marked == size and orientation in SIDEWAYS:
        return True
    raise BadImage(
        name, f"its marks are for {marked[1]}x{marked[0]} pixels, and the image has {size[0]}x{size[1]}: correct either"
    )


def _check_pixels(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        megapixels = f"{width * height / 1e6:.1f} megapixels"
        raise BadImage(name, f"{width}x{height} is {megapixels}, over the limit of {max_pixels / 1e6:g} (max_pixels)")


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises on a broken file into BadImage."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks about odd EXIF blocks and the like
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except (BadImage, UserError):
            raise
        except UnidentifiedImageError as error:
            raise BadImage(name, f"not an image in a known format ({', '.join(FORMATS)})") from error
        except Exception as error:  # broken files raise nearly anything: OSError, SyntaxError, ValueError, …
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadImage(name, reason) from error


def _to_mode(image: Image.Image, in_chans: int, name: str, bit_depth: int | None) -> Image.Image:
    """Convert any mode to "L" or "RGB" without losing what convert() would lose: high bits and transparency."""
    mode = "L" if in_chans == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bits(np.asarray(image), name, bit_depth))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode == "P" and mode == "L":
        image = image.convert("RGB")  # a palette may hold colours: luminance comes from those
    return image.convert(mode)


def _eight_bits(values: np.ndarray, name: str, bit_depth: int | None) -> np.ndarray:
    """Scale numbers from 0 to 2**bit_depth - 1 to uint8; without it integers have 16 bits, and floats end at 1."""
    if not np.isfinite(values).all():
        raise BadImage(name, "it holds numbers that are not finite")
    lowest, highest = values.min(), values.max()
    if bit_depth is None and values.dtype.kind != "f":
        if 0 < highest < 2**SHALLOW:
            raise UserError(_depth_sentence(name, int(highest)))
        bit_depth = 16
    top = 1 if bit_depth is None else 2**bit_depth - 1
    if lowest < 0 or highest > top:
        raise UserError(
            f"{name} holds numbers from {lowest:g} to {highest:g}, and its range is 0 to {top}: give the bit_depth of"
            " its numbers, or scale them to that range"
        )
    scaled: np.ndarray = np.rint(values.astype(np.float64) / (top / 255)).astype(np.uint8)
    return scaled


def _depth_sentence(name: str, highest: int) -> str:
    depth = next(bits for bits in (8, 10, 12, SHALLOW) if highest < 2**bits)
    return (
        f"{name} has 16 bits, but no number above {highest}: give bit_depth={depth} if its numbers go up to"
        f" {2**depth - 1}, and bit_depth=16 if it is so dark"
    )


def _check_colours(image: Image.Image, name: str, bit_depth: int | None) -> None:
    """Of colours of 16 bits Pillow keeps the upper 8: nothing is left of numbers that go less far."""
    if bit_depth is None:
        highest = int(np.asarray(image.convert("RGB")).max())
        if highest < 2 ** (SHALLOW - 8):
            raise UserError(f"{_depth_sentence(name, (highest << 8) + 255)}; colours of fewer have to be saved with 8")
    elif bit_depth != 16:
        raise UserError(
            f"{name} has colours of 16 bits, of which the upper 8 are read, so bit_depth={bit_depth} is not possible:"
            " save it with 8 bits"
        )


def _check_black(image: Image.Image) -> None:
    """Refuse a TIFF of more than 8 bits whose 0 is white: Pillow turns only those of up to 8 bits over."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None and image.mode.startswith(("I", "F")) and tags.get(PHOTOMETRIC) == 0:
        raise ValueError(
            "TIFFs of more than 8 bits that count from white are not supported: save it counting from black"
        )


def _stated_depth(image: Image.Image) -> int | None:
    """The bits of a grey value that has more than 8, where a TIFF states them."""
    tags = getattr(image, "tag_v2", None)
    if tags is None or not image.mode.startswith("I"):
        return None
    bits, highest = (np.ravel(tags.get(tag, 0)).max() for tag in (BITS_PER_SAMPLE, MAX_SAMPLE_VALUE))
    if 8 < bits < 16:
        return int(bits)
    depth = int(highest).bit_length()
    return depth if depth >= 8 and highest == 2**depth - 1 else None


def list_images(folder: str | Path, extensions: Collection[str] = EXTENSIONS) -> list[str]:
    """Return the image files below `folder`, or those of other `extensions`: sorted relative paths with forward
    slashes, without hidden ones.

    Links are followed. A file or folder that several paths lead to is listed once, by the path with the fewest links;
    links in circles end, and those that lead nowhere, or to a folder that holds this one, are ignored.
    """
    found: list[str] = []
    above = [os.stat(path) for path in Path(folder).resolve().parents]
    seen = {(status.st_dev, status.st_ino) for status in above}
    waiting = [(0, "")]  # paths by their number of links
    while waiting:
        links, inside = heapq.heappop(waiting)
        path = os.path.join(folder, inside)
        status = os.stat(path)
        real = status.st_dev, status.st_ino
        # Where no link of either kind leads to it, it is new, whatever numbers the file system gives.
        if real in seen and (links or status.st_nlink > 1):
            continue
        seen.add(real)
        if not stat.S_ISDIR(status.st_mode):
            found.append(inside)
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                link = entry.is_symlink()
                if entry.name.startswith(".") or (link and not os.path.exists(entry.path)):
                    continue
                if entry.is_dir() or (os.path.splitext(entry.name)[1].lower() in extensions and entry.is_file()):
                    heapq.heappush(waiting, (links + link, f"{inside}/{entry.name}".lstrip("/")))
    return sorted(found)
