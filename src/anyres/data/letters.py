"""Letters in the fonts that matplotlib ships: images with real detail at every size, without a download."""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from anyres.data.base import Item, MapSource
from anyres.data.decode import Drawing
from anyres.data.splits import check_split
from anyres.errors import UserError

SIDE = 256
COUNTS = {"train": 200, "val": 40}
"""Images per class."""
FONTS = {
    "train": (
        *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
        *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
        *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
        *("cmr10", "cmss10", "cmb10"),
    ),
    "val": (*(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")), "cmtt10", "cmti10"),
}
HEIGHTS = (0.4, 0.8)
"""Height of a capital as a share of the image's side."""


class Letters(MapSource):
    """26 classes, the letters of the alphabet in upper or lower case: 5200 training and 1040 validation images.

    Each image is one letter, turned and sheared, solid or in outline, in front of a blotchy, grainy ground and a few
    strokes. It is drawn anew from (split, index) every time, directly at the resolution that is asked for, up to 256
    pixels, so that large images show detail that small ones lack. Validation uses fonts that training never sees.
    """

    def __init__(self, split: str, in_chans: int = 3) -> None:
        check_split(split)
        super().__init__(f"letters/{split}", list(ascii_uppercase), in_chans)
        self._splits = ["train", "val"] if split == "all" else [split]
        self.crop_pct = 1.0
        _font(FONTS["val"][0], 10.0)  # raises UserError now if matplotlib comes without its fonts

    def __len__(self) -> int:
        return sum(len(ascii_uppercase) * COUNTS[split] for split in self._splits)

    def _item(self, index: int) -> Item:
        split = self._splits[0]
        if index >= len(ascii_uppercase) * COUNTS[split]:
            index -= len(ascii_uppercase) * COUNTS[split]
            split = self._splits[1]
        label = index // COUNTS[split]
        return Item(f"letters/{split}/{index:04d}", Drawing((SIDE, SIDE), _Letter(split, index, label)), label)


class _Letter:
    """Draws one image at any scale; small, so that it travels to a worker process quickly."""

    def __init__(self, split: str, index: int, label: int) -> None:
        self.split, self.index, self.label = split, index, label

    def __call__(self, scale: float) -> Image.Image:
        side = max(1, math.ceil(SIDE * min(scale, 1.0)))
        rng = np.random.default_rng([list(COUNTS).index(self.split), self.index])
        ground, ink = _colours(rng)
        image = _ground(rng, ground, side)
        draw = ImageDraw.Draw(image)
        for _ in range(rng.integers(0, 5)):
            _stroke(rng, draw, side, ground)
        mask = _glyph(rng, FONTS[self.split], ascii_uppercase[self.label], side)
        image.paste(tuple(int(value) for value in ink), (0, 0), mask)
        return _grain(image, rng.uniform(0, 40), (self.index, side))


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours (3,) whose luminances differ by at least 70 of 255."""
    while True:
        ground, ink = rng.uniform(0, 255, (2, 3))
        if abs((ground - ink) @ (0.299, 0.587, 0.114)) >= 70:
            return ground, ink


def _ground(rng: np.random.Generator, colour: np.ndarray, side: int) -> Image.Image:
    cells = rng.integers(2, 12)
    blotches = np.clip(colour + rng.uniform(-45, 45, (cells, cells, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(blotches).resize((side, side), Image.Resampling.BICUBIC)


def _stroke(rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, ground: np.ndarray) -> None:
    """A line or an arc, in a colour not far from that of the ground."""
    colour = tuple(int(value) for value in np.clip(ground + rng.uniform(-70, 70, 3), 0, 255))
    (x0, x1), (y0, y1) = np.sort(rng.uniform(-0.2, 1.2, (2, 2)) * side, axis=1)
    width = max(1, round(side * rng.uniform(0.004, 0.04)))
    if rng.random() < 0.5:
        ends = (y0, y1) if rng.random() < 0.5 else (y1, y0)
        draw.line((x0, ends[0], x1, ends[1]), fill=colour, width=width)
    else:
        draw.arc((x0, y0, x1, y1), rng.uniform(0, 360), rng.uniform(0, 360), fill=colour, width=width)


def _glyph(rng: np.random.Generator, fonts: tuple[str, ...], letter: str, side: int) -> Image.Image:
    """The coverage of the letter, mode "L"."""
    letter = letter.lower() if rng.random() < 0.5 else letter
    font_name = fonts[rng.integers(len(fonts))]
    height = side * HEIGHTS[0] * (HEIGHTS[1] / HEIGHTS[0]) ** rng.random()
    font = _font(font_name, height / 0.7)  # a capital is about 0.7 em tall
    left, top, right, bottom = font.getbbox(letter)
    angle, shear, stretch = rng.uniform(-0.35, 0.35), rng.uniform(-0.2, 0.2), rng.uniform(0.75, 1.3)
    outlined, thickness = rng.random() < 0.25, rng.uniform(0.03, 0.06)
    # The centre of the letter goes where all of it is likely to stay inside.
    room = max(0.0, 0.5 - 0.45 * height / side)
    centre = (0.5 + rng.uniform(-room, room, 2)) * side
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    middle = side / 2
    place = (middle - (left + right) / 2, middle - (top + bottom) / 2)
    stroke = max(1, round(height * thickness)) if outlined else 0
    draw.text(place, letter, fill=255, font=font, stroke_width=stroke)
    if outlined:
        inside = Image.new("L", (side, side))
        ImageDraw.Draw(inside).text(place, letter, fill=255, font=font)
        mask = ImageChops.subtract(mask, inside)
    cos, sin = math.cos(angle), math.sin(angle)
    # Output pixel → input pixel: back from the place, turned, sheared and stretched about the middle.
    a, b = cos / stretch, sin / stretch + shear
    d, e = -sin, cos
    matrix = (
        *(a, b, middle - a * centre[0] - b * centre[1]),
        *(d, e, middle - d * centre[0] - e * centre[1]),
    )
    return mask.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def _grain(image: Image.Image, strength: float, seed: tuple[int, int]) -> Image.Image:
    """Add noise whose strength falls with the resolution as it would by averaging the pixels of the full one."""
    side = image.width
    noise = np.frombuffer(np.random.default_rng(seed).bytes(side * side), dtype=np.int8).reshape(side, side, 1)
    pixels = np.asarray(image, dtype=np.float32) + noise * np.float32(strength / 74 * side / SIDE)  # 74: rms of int8
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@lru_cache(maxsize=32)  # every font holds a file open
def _font(name: str, size: float) -> ImageFont.FreeTypeFont:
    package = importlib.util.find_spec("matplotlib")  # importing it would take longer than drawing an epoch begins
    for folder in (package.submodule_search_locations or ()) if package is not None else ():
        file = Path(folder) / "mpl-data" / "fonts" / "ttf" / f"{name}.ttf"
        if file.is_file():
            return ImageFont.truetype(file, size)
    raise UserError(f"matplotlib's font {name}.ttf is missing, which the built-in letters need: reinstall matplotlib")
