"""Scenes composed of scikit-learn's digits: masks, instances and keypoints to train on without a download.

A scene shows one to five stickers on a blotchy, grainy background. A sticker is a dark digit on light-coloured paper,
cut out along the digit's outline. The ground truth is known to the pixel, so the same scene serves segmentation,
detection, instance masks and keypoints. The paper gives objects an area: the thin strokes of digits this small have
almost none.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from anyres.data.sources import Digits
from anyres.errors import UserError

COUNTS = {"train": 4000, "val": 200}
KEYPOINT_NAMES = ("top", "right", "bottom", "left")
NARROWEST = 0.7
HEIGHTS = (0.3, 0.55)  # of a digit without its paper, as a share of the scene's longer side
MARGIN = 0.17  # paper around a straight edge of ink, as a share of the digit's height
VISIBLE = 0.85  # at least this share of a digit's ink stays uncovered by other digits
CROWDED = 0.05  # at most this share of a new digit's bounding box may already be inked
INK = 0.45  # where the ink ends: threshold on the enlarged digit, whose maximum is 1


class Scene(NamedTuple):
    """An image with its ground truth: n digits, later ones drawn over earlier ones, with K = 4 keypoints each.

    `image` is uint8 (H, W, 3). `boxes` is float32 (n, 4): x1, y1, x2, y2 in pixels, tight around the visible paper.
    `labels` is int64 (n,), the digit. `masks` is bool (n, H, W), the visible paper. `keypoints` is float32 (n, K, 3):
    x, y and visibility (2 if visible, 1 if covered by a later digit), for the outermost points of the whole paper (see
    KEYPOINT_NAMES) at their pixel centres. `classes` is uint8 (H, W): 0 for the background and 1 + digit for visible
    paper.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    keypoints: np.ndarray
    classes: np.ndarray


class Scenes:
    """`count` scenes made of the digits of a split, each drawn on demand from (seed, split, index).

    The longer side has `side` pixels and the other side 70 to 100 % of that. Scenes of "train" use only the training
    digits of `Digits`, and scenes of "val" only the others. Raises UserError for any other split, and if `side` or
    `count` is too small.
    """

    def __init__(self, split: str, side: int = 128, count: int | None = None, seed: int = 0) -> None:
        if split not in COUNTS:
            raise UserError(f"split {split!r} of the composed digits must be 'train' or 'val'")
        if side < 48:  # from 48 px on, every sticker fits and most are legible to a person
            raise UserError(f"side {side} of the composed digits must be at least 48 pixels")
        if count is not None and count < 1:
            raise UserError(f"count {count} of the composed digits must be at least 1")
        self.split, self.side, self.seed = split, side, seed
        self.digits = Digits(split)
        self.count = COUNTS[split] if count is None else count

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """Draw scene `index`; the result is always the same."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, list(COUNTS).index(self.split), index])
        height, width = self.side, max(1, round(self.side * rng.uniform(NARROWEST, 1)))
        if rng.random() < 0.5:
            height, width = width, height
        image = _ground(rng, height, width)
        owner = np.full((height, width), -1, dtype=np.int64)  # index of the digit visible at each pixel, or -1
        labels: list[int] = []
        points: list[np.ndarray] = []
        areas: list[int] = []  # pixels of each sticker, covered ones included
        wanted = rng.integers(1, 6)
        while wanted > 0 or not labels:
            wanted -= 1
            digit = int(rng.integers(len(self.digits)))
            tall = self.side * HEIGHTS[0] * (HEIGHTS[1] / HEIGHTS[0]) ** rng.random()
            ink, paper = cut_out(draw_digit(self.digits.images[digit], tall, stretch=rng.uniform(0.85, 1.15)), tall)
            shape = paper >= 0.5
            corner = _place(rng, owner, shape, areas)
            if corner is None:
                continue
            place = np.s_[corner[0] : corner[0] + shape.shape[0], corner[1] : corner[1] + shape.shape[1]]
            for coverage, darkest, lightest in ((paper, 225, 255), (ink, 0, 50)):
                colour = rng.uniform(darkest, lightest, 3).astype(np.float32)
                image[place] += coverage[..., None] * (colour - image[place])
            owner[place][shape] = len(labels)
            labels.append(int(self.digits.labels[digit]))
            points.append(_outermost(shape) + corner)
            areas.append(int(shape.sum()))
        masks = owner == np.arange(len(labels))[:, None, None]
        return Scene(
            image=np.clip(np.rint(image), 0, 255).astype(np.uint8),
            boxes=np.stack([_box(mask) for mask in masks]),
            labels=np.array(labels),
            masks=masks,
            keypoints=np.stack([_keypoints(rows, mask) for rows, mask in zip(points, masks, strict=True)]),
            classes=np.array([0, *(1 + label for label in labels)], dtype=np.uint8)[owner + 1],
        )


def draw_digit(digit: np.ndarray, height: float, stretch: float = 1.0) -> np.ndarray:
    """Smoothly enlarge an 8x8 digit (uint8) until its ink is about `height` pixels tall.

    Returns its coverage, float32 (h, w) from 0 to 1, cropped to the covered area. `stretch` makes the digit wider.
    """
    inked = digit >= 255 * INK
    rows, columns = (np.flatnonzero(inked.any(axis)) for axis in (1, 0))
    glyph = np.pad(digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    scale = height / (len(glyph) - 2)
    shape = round(scale * stretch * glyph.shape[1]), round(scale * glyph.shape[0])
    smooth = np.asarray(Image.fromarray(glyph).resize(shape, Image.Resampling.BICUBIC), dtype=np.float32) / 255
    coverage: np.ndarray = np.clip((smooth - INK) * scale / 1.5 + 0.5, 0, 1)  # an edge about two pixels wide
    rows, columns = (np.flatnonzero((coverage > 0).any(axis)) for axis in (1, 0))
    return coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def cut_out(ink: np.ndarray, height: float) -> tuple[np.ndarray, np.ndarray]:
    """Turn the coverage of a digit `height` pixels tall into (padded coverage, coverage of its paper), both (h, w)."""
    margin = MARGIN * height
    ink = np.pad(ink, round(2 * margin) + 1)
    spread = Image.fromarray(np.rint(255 * ink).astype(np.uint8)).filter(ImageFilter.GaussianBlur(margin))
    # A blurred straight edge still has 16 % of its level one standard deviation outside.
    paper: np.ndarray = np.clip((np.asarray(spread, dtype=np.float32) / 255 - 0.16) * 2 * margin + 0.5, 0, 1)
    rows, columns = (np.flatnonzero((paper > 0).any(axis)) for axis in (1, 0))
    place = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return ink[place], paper[place]


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw blotches around one colour, with grain on top: float32 (height, width, 3) in 0 to 255."""
    cells = rng.integers(2, 9)
    blotches = rng.uniform(0, 150, 3) + rng.uniform(-60, 60, (cells, cells, 3))
    small = Image.fromarray(np.clip(blotches, 0, 255).astype(np.uint8))
    ground = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = np.frombuffer(rng.bytes(height * width * 3), dtype=np.int8).reshape(height, width, 3)
    return ground + grain * np.float32(rng.uniform(0, 0.25))


def _place(rng: np.random.Generator, owner: np.ndarray, shape: np.ndarray, areas: list[int]) -> tuple[int, int] | None:
    """Find the top and left of a place for `shape` that leaves enough of every earlier sticker visible.

    Returns None after ten failed attempts, or if the shape is larger than the scene.
    """
    if shape.shape[0] > owner.shape[0] or shape.shape[1] > owner.shape[1]:
        return None
    visible = np.bincount(owner.ravel() + 1, minlength=len(areas) + 1)[1:]
    for _ in range(10):
        top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(owner.shape, shape.shape, strict=True))
        under = owner[top : top + shape.shape[0], left : left + shape.shape[1]]
        covered = np.bincount(under[shape] + 1, minlength=len(areas) + 1)[1:]
        if (under >= 0).mean() <= CROWDED and np.all(visible - covered >= VISIBLE * np.array(areas)):
            return top, left
    return None


def _outermost(shape: np.ndarray) -> np.ndarray:
    """Return rows and columns (4, 2) of the middle pixel of the top row, right column, bottom row and left column."""
    (top, bottom), (left, right) = (np.flatnonzero(shape.any(axis))[[0, -1]] for axis in (1, 0))
    return np.array(
        [
            (top, _middle(shape[top])),
            (_middle(shape[:, right]), right),
            (bottom, _middle(shape[bottom])),
            (_middle(shape[:, left]), left),
        ]
    )


def _middle(line: np.ndarray) -> int:
    inked = np.flatnonzero(line)
    return int(inked[len(inked) // 2])


def _box(mask: np.ndarray) -> np.ndarray:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)


def _keypoints(points: np.ndarray, mask: np.ndarray) -> np.ndarray:
    visible = mask[points[:, 0], points[:, 1]]
    return np.column_stack([points[:, 1] + 0.5, points[:, 0] + 0.5, 1 + visible]).astype(np.float32)
