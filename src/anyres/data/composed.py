"""Scenes composed of scikit-learn's digits: pixels, instances and keypoints to learn from without a download.

A scene is a picture of one to five stickers on a blotchy, grainy ground: a dark digit on paper of a light colour, cut
out along the digit. What it holds is known to the pixel, so that one scene serves segmentation, detection, instance
masks and keypoints. The paper gives objects an area, which the thin strokes of digits this small have not.
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
HEIGHTS = (0.3, 0.55)  # of a digit without its paper, as shares of the longer side
MARGIN = 0.17  # of the paper around a straight edge of ink, as a share of the digit's height
VISIBLE = 0.85  # the least share of its ink that the other digits leave of one
CROWDED = 0.05  # the largest share of a digit's rectangle where there is ink of others already
INK = 0.45  # the level of the enlarged digit, of 1, at which its ink ends


class Scene(NamedTuple):
    """A picture and what is in it; n digits, the later over the earlier, K = 4 keypoints each.

    `image` uint8 (H, W, 3); `boxes` float32 (n, 4), x1, y1, x2, y2 in pixels, tight around the visible paper; `labels`
    int64 (n,), the digit; `masks` bool (n, H, W), the visible paper; `keypoints` float32 (n, K, 3), x, y and 2 where
    visible, 1 where a later digit covers it, for the outermost points of the whole paper (see KEYPOINT_NAMES) at the
    centres of their pixels; `classes` uint8 (H, W), 0 for the ground and 1 + digit for visible paper.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    keypoints: np.ndarray
    classes: np.ndarray


class Scenes:
    """`count` scenes of the digits of a split, each drawn anew from (seed, split, index).

    The longer side has `side` pixels, the other 70 to 100 % of that. Scenes of "train" hold only the training digits
    of `Digits`, those of "val" only the others. Raises UserError for another split, or too small a side or count.
    """

    def __init__(self, split: str, side: int = 128, count: int | None = None, seed: int = 0) -> None:
        if split not in COUNTS:
            raise UserError(f"split {split!r} of the composed digits must be 'train' or 'val'")
        if side < 48:  # then every sticker fits, and a person can read most of them
            raise UserError(f"side {side} of the composed digits must be at least 48 pixels")
        if count is not None and count < 1:
            raise UserError(f"count {count} of the composed digits must be at least 1")
        self.split, self.side, self.seed = split, side, seed
        self.digits = Digits(split)
        self.count = COUNTS[split] if count is None else count

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """Draw scene `index`; always the same one."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, list(COUNTS).index(self.split), index])
        height, width = self.side, max(1, round(self.side * rng.uniform(NARROWEST, 1)))
        if rng.random() < 0.5:
            height, width = width, height
        image = _ground(rng, height, width)
        owner = np.full((height, width), -1, dtype=np.int64)  # the place in the scene of the digit that shows
        labels: list[int] = []
        points: list[np.ndarray] = []
        areas: list[int] = []  # pixels of each sticker, covered or not
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
    """Enlarge an 8x8 digit (uint8) smoothly, its ink about `height` pixels tall: coverage from 0 to 1, float32 (h, w),
    cut to what is covered. `stretch` makes it wider."""
    inked = digit >= 255 * INK
    rows, columns = (np.flatnonzero(inked.any(axis)) for axis in (1, 0))
    glyph = np.pad(digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    scale = height / (len(glyph) - 2)
    shape = round(scale * stretch * glyph.shape[1]), round(scale * glyph.shape[0])
    smooth = np.asarray(Image.fromarray(glyph).resize(shape, Image.Resampling.BICUBIC), dtype=np.float32) / 255
    coverage: np.ndarray = np.clip((smooth - INK) * scale / 1.5 + 0.5, 0, 1)  # an edge of about two pixels
    rows, columns = (np.flatnonzero((coverage > 0).any(axis)) for axis in (1, 0))
    return coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def cut_out(ink: np.ndarray, height: float) -> tuple[np.ndarray, np.ndarray]:
    """The coverage of a digit `height` pixels tall → (the same with room around it, that of its paper), both (h, w)."""
    margin = MARGIN * height
    ink = np.pad(ink, round(2 * margin) + 1)
    spread = Image.fromarray(np.rint(255 * ink).astype(np.uint8)).filter(ImageFilter.GaussianBlur(margin))
    # A straight edge, blurred, has 16 % of its level left one standard deviation outside.
    paper: np.ndarray = np.clip((np.asarray(spread, dtype=np.float32) / 255 - 0.16) * 2 * margin + 0.5, 0, 1)
    rows, columns = (np.flatnonzero((paper > 0).any(axis)) for axis in (1, 0))
    place = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return ink[place], paper[place]


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Blotches around one colour, under grain: float32 (height, width, 3) in 0 to 255."""
    cells = rng.integers(2, 9)
    blotches = rng.uniform(0, 150, 3) + rng.uniform(-60, 60, (cells, cells, 3))
    small = Image.fromarray(np.clip(blotches, 0, 255).astype(np.uint8))
    ground = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = np.frombuffer(rng.bytes(height * width * 3), dtype=np.int8).reshape(height, width, 3)
    return ground + grain * np.float32(rng.uniform(0, 0.25))


def _place(rng: np.random.Generator, owner: np.ndarray, shape: np.ndarray, areas: list[int]) -> tuple[int, int] | None:
    """The top and left of a place for `shape` that leaves enough of every earlier one; None after ten attempts, and for
    what is larger than the scene."""
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
    """The middle pixel of the top row, right column, bottom row and left column: (4, 2) rows and columns."""
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
