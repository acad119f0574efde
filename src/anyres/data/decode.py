"""Safe image decoding: few formats, a pixel limit checked before decoding, and one exception for any broken file."""

from __future__ import annotations

import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from anyres.data.schedule import Size
from anyres.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 64_000_000
INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")
SHALLOW = 14
"""A 16-bit image that uses at most this many bits is ambiguous (dark, or of lower depth), so the user must say which.
"""

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
    """An image that cannot be used: `name` identifies it and `reason` says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it can be pickled by a worker process
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Deep(NamedTuple):
    """An image whose values, if they have more than 8 bits, range from 0 to 2**bit_depth - 1."""

    data: bytes | Path | np.ndarray | Image.Image | BadImage
    bit_depth: int


class Drawing(NamedTuple):
    """An image that is drawn on demand."""

    size: Size
    """(height, width) at scale 1, the finest."""
    draw: Callable[[float], Image.Image]
    """Return an "RGB" image of at least `scale` x size."""


class Kept(ABC):
    """An image that opens itself, from memory where it has been decoded before (`anyres.data.kept`)."""

    @abstractmethod
    def open(self, name: str, in_chans: int, max_pixels: int, marked: Size | None) -> AbstractContextManager[Picture]:
        """What `open_picture` gives for the image."""


Data = bytes | Path | np.ndarray | Image.Image | Drawing | BadImage | Deep | Kept
"""What a source returns for an image: an encoded file, its path, uint8 pixels, a decoded image, a drawing, an error, or
one that was kept."""


def with_depth(data: Data, bit_depth: int | None) -> Data:
    """Attach the known bit depth to an image; None attaches nothing. Raises UserError unless it is from 1 to 32."""
    if bit_depth is None or isinstance(data, Deep | Drawing | Kept):
        return data
    if not 1 <= bit_depth <= 32:
        raise UserError(f"bit_depth is {bit_depth}; it must be from 1 to 32")
    return Deep(data, bit_depth)


class Picture(NamedTuple):
    """An image with a known size that is not decoded yet."""

    size: Size
    """(height, width) of the image that `decode` returns at scale 1."""
    decode: Callable[[float], Image.Image]
    """Decode for use at `scale` times the size. The result may be smaller than `size`, but never smaller than asked
    for: a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size in a fraction of the time."""
    reduces: bool = False
    """Whether it is decoded at 1/2, 1/4 or 1/8 where that is enough."""

    def reduction(self, scale: float) -> int:
        """What the sides are divided by if the picture is decoded at `scale`: 1, 2, 4 or 8, as libjpeg chooses."""
        height, width = self.size
        most = min(width // _least(width, scale), height // _least(height, scale))
        return max(step for step in (1, 2, 4, 8) if step <= most) if self.reduces else 1


def _least(side: int, scale: float) -> int:
    return math.ceil(side * min(scale, 1.0))


@contextmanager
def open_picture(
    data: Data, name: str, in_chans: int = 3, max_pixels: int = MAX_PIXELS, marked: Size | None = None
) -> Iterator[Picture]:
    """Open an image to be decoded once, as mode "L" (`in_chans` 1) or "RGB" (`in_chans` 3), upright according to EXIF.

    `marked` is the size (height, width) of the image's annotations. The image is then decoded in the orientation in
    which it was annotated: as stored if the stored size equals `marked`, otherwise upright if the upright size does. If
    both do, as for square images, it is decoded as stored, because COCO's annotations and the tools that write masks
    refer to the stored pixels.

    Transparent areas become white. Only the first frame or page is read. Images with more than 8 bits per channel are
    scaled to 8 by their range: 0 to 2**bit_depth - 1 (see `with_depth`) if the depth is given, otherwise what a TIFF
    states (a BitsPerSample such as 12, or a MaxSampleValue of 2**n - 1), otherwise 65535 for integers and 1 for floats.
    PNG's sBIT chunk is ignored, because files that have one are scaled to 16 bits anyway. The range is never guessed
    from the pixel values.

    Raises BadImage for any problem with the file, including more than `max_pixels` pixels (checked before decoding) and
    a size that does not match `marked`. Raises UserError if the user has to state the range: for values outside it, and
    for a 16-bit image that uses 14 bits or fewer.
    """
    bit_depth = None
    if isinstance(data, Kept):
        with data.open(name, in_chans, max_pixels, marked) as picture:
            yield picture
        return
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
    """Decode the full-size image; see `open_picture`."""
    with open_picture(data, name, in_chans, max_pixels, marked) as picture:
        return picture.decode(1.0)


def load_indices(data: Data, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode the values stored in an image, integers (H, W): palette indices, or grey values of 1 to 16 bits.

    The image is never rotated, whatever its EXIF orientation. Raises BadImage for any problem with the file, and
    UserError for a colour image.
    """
    if isinstance(data, Deep):
        data = data.data  # class numbers are not scaled
    assert not isinstance(data, Drawing | Kept), "masks are neither drawn nor kept"
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
        layout = _layout(image)  # Pillow drops it once the pixels are loaded
        with _reading(name):
            indices = np.asarray(_stored(image)[0])
    if indices.dtype == bool:
        indices = indices.astype(np.uint8)
    if image.mode in ("1", "L"):  # Pillow inverts values that count from white, and stretches 2- and 4-bit values
        indices = (1 if image.mode == "1" else 255) - indices if "I" in layout else indices
        indices = indices // {"2": 85, "4": 17}.get(layout[:1], 1)
    return indices


def _layout(image: Image.Image) -> str:
    """Return how an opened, undecoded file stores a pixel, in Pillow's notation: "16B" from "RGB;16B"."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else ""
    mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return str(mode).partition(";")[2]


class _Bounded(BufferedReader):
    """A file that is never asked for more than it has, whatever length it claims for a part of itself.

    A read allocates what it is asked for in advance: up to 4 GB for a PNG of a kilobyte.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return super().read()
        return super().read(min(size, max(0, os.fstat(self.fileno()).st_size - self.tell())))


@contextmanager
def _opened(data: bytes | Path, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image file without decoding it, and check its size limit."""
    with _reading(name):
        if isinstance(data, Path) and data.exists() and not data.is_file():  # reading a pipe would block
            raise BadImage(name, "it is no regular file")
        handle = BytesIO(data) if isinstance(data, bytes) else _Bounded(FileIO(data))
    with handle:
        with _reading(name):
            if not handle.read(1):
                raise BadImage(name, "the file is empty")
            handle.seek(0)
            image: Image.Image = Image.open(handle, formats=FORMATS)
        _check_pixels(image, name, max_pixels)
        yield image


def _picture(opened: Image.Image, name: str, in_chans: int, bit_depth: int | None, marked: Size | None) -> Picture:
    """Wrap an opened file in a `Picture`."""
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
                # "L" reads the stored luminance directly, so the colour planes are never computed.
                stored.draft("L" if in_chans == 1 else None, (_least(width, scale), _least(height, scale)))
            stored.load()
            if wide_colours:
                _check_colours(stored, name, depth)
            turned = stored.transpose(UPRIGHT[orientation]) if upright and orientation in UPRIGHT else stored
            return _to_mode(turned, in_chans, name, depth)

    return Picture((width, height) if upright and orientation in SIDEWAYS else (height, width), decode, draftable)


def _orientation(image: Image.Image) -> int:
    orientation = image.getexif().get(ORIENTATION, 1)
    return orientation if orientation in UPRIGHT else 1


def _stored(image: Image.Image) -> tuple[Image.Image, int]:
    """Decode an opened image and return its pixels as stored, with its orientation.

    For some formats the orientation is known only after decoding, and Pillow rotates TIFFs on its own.
    """
    before = _orientation(image)
    image.load()
    after = _orientation(image)
    if before == 1 or before == after:
        return image, after
    return image.transpose(UPRIGHT[{6: 8, 8: 6}.get(before, before)]), before


def _shown_upright(size: tuple[int, int], orientation: int, marked: Size | None, name: str) -> bool:
    """Return whether an image stored at `size` (width, height) was annotated upright; True if it is not annotated.

    Raises BadImage if neither orientation has the annotated size.
    """
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
    """Convert any exception that Pillow raises for a broken file to BadImage."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about odd EXIF blocks and the like
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except (BadImage, UserError):
            raise
        except UnidentifiedImageError as error:
            raise BadImage(name, f"not an image in a known format ({', '.join(FORMATS)})") from error
        except Exception as error:  # broken files raise almost anything: OSError, SyntaxError, ValueError, …
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
        image = image.convert("RGB")  # a palette may contain colours, so compute the luminance from them
    return image.convert(mode)


def _eight_bits(values: np.ndarray, name: str, bit_depth: int | None) -> np.ndarray:
    """Scale values from 0 to 2**bit_depth - 1 to uint8; without a depth, integers have 16 bits and floats end at 1."""
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
    """Raise UserError for 16-bit colours that use few bits: Pillow keeps the upper 8 bits, so little would be left."""
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
    """Raise ValueError for a TIFF of more than 8 bits whose 0 is white: Pillow inverts only up to 8 bits."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None and image.mode.startswith(("I", "F")) and tags.get(PHOTOMETRIC) == 0:
        raise ValueError(
            "TIFFs of more than 8 bits that count from white are not supported: save it counting from black"
        )


def _stated_depth(image: Image.Image) -> int | None:
    """Return the bit depth that a TIFF with more than 8 bits per grey value states, or None."""
    tags = getattr(image, "tag_v2", None)
    if tags is None or not image.mode.startswith("I"):
        return None
    bits, highest = (np.ravel(tags.get(tag, 0)).max() for tag in (BITS_PER_SAMPLE, MAX_SAMPLE_VALUE))
    if 8 < bits < 16:
        return int(bits)
    depth = int(highest).bit_length()
    return depth if depth >= 8 and highest == 2**depth - 1 else None
