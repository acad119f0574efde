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

import numpy as np
from PIL import Image, UnidentifiedImageError

from anyres.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
MAX_PIXELS = 64_000_000
INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")

ORIENTATION = 0x0112  # EXIF tag
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


Data = bytes | Path | np.ndarray | Image.Image | BadImage
"""What a source hands over: an encoded file, its path, uint8 pixels, a decoded image, or why there is none."""


def load_image(
    data: Data,
    name: str,
    in_chans: int = 3,
    needed: Callable[[int, int], float] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decode `data` once into an upright image of mode "L" (`in_chans` 1) or "RGB" (`in_chans` 3).

    `needed(width, height)` is told the upright size before a JPEG is decoded, and answers with the smallest scale that
    will do (1.0: all pixels). JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the time, so the result may be
    smaller than the size told, but never smaller than scale x size. Transparency is laid over white; 16-bit grey is
    scaled to 8 bits.

    Raises BadImage for whatever is wrong with the file, also for more than `max_pixels` pixels (checked before
    decoding).
    """
    if isinstance(data, BadImage):
        raise data
    if isinstance(data, bytes | Path):
        return _load_file(data, name, in_chans, needed, max_pixels)
    image = Image.fromarray(data) if isinstance(data, np.ndarray) else data
    _check_pixels(image, name, max_pixels)
    if needed is not None:
        needed(*image.size)
    with _reading(name):
        return _to_mode(image, in_chans)


def load_indices(data: Data, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode the numbers that an image stores, (H, W) integers: the indices of a palette, the values of a grey image of
    1 to 16 bits. Raises BadImage for whatever is wrong with the file, and UserError for one with colours."""
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
            indices = np.asarray(image)
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
        handle = BytesIO(data) if isinstance(data, bytes) else data.open("rb")
    with handle:
        with _reading(name):
            if not handle.read(1):
                raise BadImage(name, "the file is empty")
            handle.seek(0)
            image: Image.Image = Image.open(handle, formats=FORMATS)
        _check_pixels(image, name, max_pixels)
        yield image


def _load_file(
    data: bytes | Path, name: str, in_chans: int, needed: Callable[[int, int], float] | None, max_pixels: int
) -> Image.Image:
    with _opened(data, name, max_pixels) as image:
        with _reading(name):
            draftable = image.format in ("JPEG", "MPO")
            if not draftable:
                image.load()  # the orientation of these is only sure after loading
            orientation = image.getexif().get(ORIENTATION, 1)
            width, height = image.size
        # Outside `_reading`: an error in there would be the caller's, not the file's.
        scale = 1.0
        if needed is not None:
            scale = needed(height, width) if orientation in SIDEWAYS else needed(width, height)
        with _reading(name):
            if draftable:
                # "L" takes the luminance as it is stored, so the colour planes are never computed.
                least = (math.ceil(width * min(scale, 1.0)), math.ceil(height * min(scale, 1.0)))
                image.draft("L" if in_chans == 1 else None, least)
            image.load()
            if orientation in UPRIGHT:
                image = image.transpose(UPRIGHT[orientation])
            return _to_mode(image, in_chans)


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
        except BadImage:
            raise
        except UnidentifiedImageError as error:
            raise BadImage(name, f"not an image in a known format ({', '.join(FORMATS)})") from error
        except Exception as error:  # broken files raise nearly anything: OSError, SyntaxError, ValueError, …
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadImage(name, reason) from error


def _to_mode(image: Image.Image, in_chans: int) -> Image.Image:
    """Convert any mode to "L" or "RGB" without losing what convert() would lose: high bits and transparency."""
    mode = "L" if in_chans == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode == "P" and mode == "L":
        image = image.convert("RGB")  # a palette may hold colours: luminance comes from those
    return image.convert(mode)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scale to uint8: integers from the 16-bit range, floats from [0, 1] if they fit in it and from [0, 255] if not."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
        values = values * 255 if values.max() <= 1 else values
    else:
        values = values.astype(np.float64) / 257
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def list_images(folder: str | Path, extensions: Collection[str] = EXTENSIONS) -> list[str]:
    """Return the image files below `folder`, or those of other `extensions`: sorted relative paths with forward
    slashes, without hidden ones.

    Links are followed. A file or folder that several paths lead to is listed once, by the path with the fewest links,
    so links in circles end; a link that leads nowhere is ignored.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
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
