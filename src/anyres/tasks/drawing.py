"""Draw results on images: classes of pixels with a legend, or boxes with masks, keypoints and names."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anyres.io.fonts import drawable, font_for
from anyres.io.text import printable, shorten

MARGIN = 6
LONGEST = 60
"""Largest length of a drawn line of text."""


def class_colour(index: int) -> tuple[int, int, int]:
    """Return the RGB colour of a class: hues a golden ratio apart, so that neighbours differ, in three brightnesses."""
    red, green, blue = colorsys.hsv_to_rgb((0.05 + index * 0.618034) % 1, 0.75, (0.95, 0.75, 0.55)[index % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_segmentation(
    image: Image.Image, classes: np.ndarray, names: Sequence[str], opacity: float = 0.55
) -> Image.Image:
    """Overlay the image with its classes (H, W), and add a legend of the classes with their share of the pixels.

    A class named "background" is not coloured.
    """
    present, counts = np.unique(classes, return_counts=True)
    palette = np.zeros((int(present.max()) + 1, 3))
    for index in present:
        palette[index] = class_colour(int(index))
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    background = names.index("background") if "background" in names else -1
    share = np.where(classes == background, 0.0, opacity)[..., None]
    blended = Image.fromarray(np.rint((1 - share) * pixels + share * palette[classes]).astype(np.uint8))
    order = sorted(range(len(present)), key=lambda place: -counts[place])[:24]
    shares = 100 * counts / counts.sum()
    entries = [(int(present[place]), f"{names[present[place]]}  {shares[place]:.1f} %") for place in order]
    return _beside(_enlarge(blended), entries)


def draw_detections(
    image: Image.Image,
    boxes: np.ndarray,
    labels: Sequence[int],
    scores: Sequence[float],
    names: Sequence[str],
    masks: np.ndarray | None = None,
    keypoints: np.ndarray | None = None,
    opacity: float = 0.45,
) -> Image.Image:
    """Draw boxes, names and scores on an image.

    Args:
        boxes: (n, 4) left, top, right, bottom in pixels of the image.
        masks: (n, H, W) bool, drawn below the boxes.
        keypoints: (n, K, 3) x, y, visible, drawn above the boxes.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    if masks is not None:
        for mask, label in zip(masks, labels, strict=True):
            pixels[mask] = (1 - opacity) * pixels[mask] + opacity * np.array(class_colour(label))
    drawn = Image.fromarray(np.rint(pixels).astype(np.uint8))
    factor = _enlargement(drawn)
    drawn = _enlarge(drawn)
    pen, letters = ImageDraw.Draw(drawn), _font_size(drawn)
    width = max(1, round(max(drawn.size) / 320))
    for i, box in enumerate(boxes):
        colour = class_colour(labels[i])
        left, top, right, bottom = (float(value) * factor for value in box)
        pen.rectangle((left, top, right, bottom), outline=colour, width=width)
        text, font = _lettering(f"{names[labels[i]]} {scores[i]:.2f}", letters)
        height = pen.textbbox((0, 0), text, font=font)[3]
        place = (left, top - height - 1 if top > height else top + width)
        pen.rectangle(pen.textbbox(place, text, font=font), fill=colour)
        pen.text(place, text, fill=_ink(colour), font=font)
        for x, y, visible in keypoints[i] if keypoints is not None else ():
            if visible > 0:
                x, y, radius = x * factor, y * factor, 1.5 * width
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline="white")
    return drawn


def draw_clip(frames: np.ndarray, lines: Sequence[str], count: int = 8) -> Image.Image:
    """Draw `count` evenly spaced frames of a clip (T, H, W, 3) in a row, with lines of text below."""
    chosen = frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
    strip = _enlarge(Image.fromarray(np.concatenate(list(chosen), axis=1)), least=960)
    height = _line_height(_font_size(strip)) + 4
    sheet = Image.new("RGB", (strip.width, strip.height + height * len(lines) + 2 * MARGIN), "white")
    sheet.paste(strip, (0, 0))
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        text, font = _lettering(line, _font_size(strip))
        pen.text((MARGIN, strip.height + MARGIN + number * height), text, fill="black", font=font)
    return sheet


def _enlargement(image: Image.Image, least: int = 480) -> int:
    return max(1, -(-least // max(image.size)))


def _enlarge(image: Image.Image, least: int = 480) -> Image.Image:
    """Enlarge an image by an integer factor, so that text fits on small images and pixels stay square."""
    factor = _enlargement(image, least)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _font_size(image: Image.Image) -> int:
    return max(12, round(max(image.size) / 50))


def _lettering(line: str, size: int) -> tuple[str, ImageFont.ImageFont | ImageFont.FreeTypeFont]:
    """Return a line of text in a form that can be drawn, and a font of `size` pixels that has its characters."""
    line = shorten(printable(line), LONGEST)
    if line.isascii():  # Pillow's own font covers only ASCII
        return line, ImageFont.load_default(size)
    return drawable(line), ImageFont.truetype(font_for(line).fname, size)


def _line_height(size: int) -> int:
    return round(ImageFont.load_default(size).getbbox("Ag")[3])


def _ink(colour: tuple[int, int, int]) -> str:
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _beside(image: Image.Image, entries: Sequence[tuple[int, str]]) -> Image.Image:
    """Add a legend to the right of an image."""
    size = _font_size(image)
    line = _line_height(size) + MARGIN
    lettered = [(index, *_lettering(text, size)) for index, text in entries]
    width = round(max(font.getlength(text) for _, text, font in lettered)) + line + 3 * MARGIN
    sheet = Image.new("RGB", (image.width + width, max(image.height, line * len(entries) + 2 * MARGIN)), "white")
    sheet.paste(image, (0, 0))
    pen = ImageDraw.Draw(sheet)
    for number, (index, text, font) in enumerate(lettered):
        left, top = image.width + MARGIN, MARGIN + number * line
        pen.rectangle((left, top, left + line - MARGIN, top + line - MARGIN), fill=class_colour(index))
        pen.text((left + line, top), text, fill="black", font=font)
    return sheet
