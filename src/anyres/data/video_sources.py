"""Sources of labelled clips: folders and lists of video files, and moving digits."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from anyres.data.base import Item, MapSource
from anyres.data.classes import check_classes, match_classes, name_labels, plain_number, tell_subset
from anyres.data.listing import list_images
from anyres.data.sources import Digits, ImageFolder
from anyres.data.splits import check_split, find_split
from anyres.errors import UserError
from anyres.extras import require
from anyres.io.parsing import read_text

logger = logging.getLogger(__name__)

EXTENSIONS = frozenset({".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"})
MEAN, STD = (0.45,) * 3, (0.225,) * 3
"""Mean and std of the published video networks: facebookresearch/SlowFast, slowfast/config/defaults.py."""


ANNOTATION_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


def open_video_source(
    spec: str | os.PathLike[str],
    split: str = "train",
    *,
    label_names: Sequence[str] | None = None,
    whole: bool = False,
) -> MapSource:
    """Open a video classification dataset for `split` "train", "val" or "all".

    `spec` is one of

    - "digits": moving digits, see `MovingDigits`;
    - a folder FOLDER/train/CLASS/*.mp4 with FOLDER/val/CLASS/*.mp4; or FOLDER/CLASS/*.mp4, where a fixed tenth of each
      class is the validation split;
    - a folder with FOLDER/train.csv and FOLDER/val.csv, or one such list FILE.csv for every split, see `VideoList`.

    `label_names` numbers the classes by a given list, such as a checkpoint's. `whole` reads all of a folder without
    splits, instead of a "train" or "val" share. Raises UserError or FileNotFoundError with a message that says what is
    missing.
    """
    text = os.fspath(spec)
    source: MapSource
    if text != "digits" and not Path(text).exists():
        raise FileNotFoundError(f"there is no dataset {text!r}: give digits, a folder of videos, or a list FILE.csv")
    if text != "digits":
        require("av")
    if text == "digits":
        source = MovingDigits(split)
    elif text.endswith(".csv") or find_split([path.stem for path in Path(text).glob("*.csv")], "train"):
        source = VideoList(text, split)
    else:
        source = VideoFolder(text, split, whole=whole)
    check_classes(source.label_names, source.name)
    if label_names is not None and list(label_names) != source.label_names:
        source.use_labels(label_names)
    return source


class VideoFolder(ImageFolder):
    """Video files in one folder per class, with the layout and splits of `ImageFolder`."""

    extensions = EXTENSIONS
    kind = "video"

    def __init__(self, folder: str, split: str, *, whole: bool = False) -> None:
        super().__init__(folder, split, whole=whole)
        self.mean, self.std = MEAN, STD


class VideoList(MapSource):
    """Video files from a list with lines "PATH LABEL" or "PATH,LABEL", with or without a header line.

    Paths are relative to the list's folder. Labels are class numbers or names; names are numbered in the sorted order
    of those in train.csv. The original Kinetics annotations (with a header that has label, youtube_id, time_start and
    time_end) are supported too. Their videos may be anywhere below the folder, and are named ID_START_END with six
    digits each, or ID. Many of these videos are no longer available, so missing ones are left out and counted in the
    log.

    `spec` is a folder with train.csv and a list named like one of `VALIDATION_NAMES`, or a single list that serves as
    every split. Raises UserError for any other kind of line, and for classes that are not in the training list.
    """

    def __init__(self, spec: str, split: str) -> None:
        check_split(split)
        super().__init__(f"{spec}/{split}", [])
        self.mean, self.std = MEAN, STD
        train = val = Path(spec)
        if train.suffix != ".csv":
            lists = [path.stem for path in Path(spec).glob("*.csv")]
            train, val = (Path(spec, f"{find_split(lists, part) or part}.csv") for part in ("train", "val"))
        chosen = {"train": [train], "val": [val], "all": [train, val]}[split]
        pairs_of = {path: _read_list(path) for path in dict.fromkeys([train, *chosen])}
        self.label_names = name_labels({label for _, label in pairs_of[train]}, str(train))
        pairs: list[tuple[str, int]] = []
        for path in dict.fromkeys(chosen):
            whose = {"knower": str(train), "namer": str(path)}
            names = sorted({plain_number(label) for _, label in pairs_of[path]})
            places = match_classes(self.label_names, names, **whose, fix="Correct one of the lists")
            tell_subset(self.label_names, places, **whose)
            place = dict(zip(names, places, strict=True))
            pairs += [(file, place[plain_number(label)]) for file, label in pairs_of[path]]
        self.root = train.parent
        # One array of bytes: a list of strings would be copied into every worker as soon as it is touched
        # (copy-on-write).
        self.files = np.array([os.fsencode(file) for file, _ in pairs])
        self.labels = np.array([label for _, label in pairs])

    def __len__(self) -> int:
        return len(self.files)

    def paths(self) -> Iterator[str]:
        return (os.path.join(self.root, os.fsdecode(file)) for file in self.files)

    def _item(self, index: int) -> Item:
        file = os.fsdecode(self.files[index])
        return Item(file, self.root / file, int(self.labels[index]))


def _read_list(path: Path) -> list[tuple[str, str]]:
    """Return (path relative to the list, label) for every video."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {path}: give FOLDER/train.csv and FOLDER/val.csv, or class folders")
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if lines and "youtube_id" in next(csv.reader(lines[:1], skipinitialspace=True)):
        pairs = _read_annotations(path, lines)
    else:
        comma = bool(lines) and _has_comma(lines[0])
        split = [line.rsplit("," if comma else None, 1) for line in lines]
        bad = next((line for line, parts in zip(lines, split, strict=True) if len(parts) != 2), None)
        if bad is not None:
            raise UserError(f"the line {bad[:80]!r} of {path} must be a path and a label, such as clips/a.mp4,3")
        pairs = [(file.strip(), label.strip()) for file, label in split]
        first = pairs[0] if pairs else ("", "")
        others = any(Path(file).suffix.lower() in EXTENSIONS for file, _ in pairs[1:2])
        if not Path(first[0]).suffix and (first[1] == "label" or others):
            pairs = pairs[1:]  # header
    if not pairs:
        raise UserError(f"{path} lists no video that is there: check the list and the folder {path.parent}")
    return pairs


def _has_comma(line: str) -> bool:
    """Return whether the separator is a comma rather than blanks; paths may contain both, and labels may contain
    blanks."""
    file, comma, label = line.rpartition(",")
    words = label.split()
    blanks = len(words) > 1 and words[-1].isdecimal() and Path(file.strip()).suffix.lower() not in EXTENSIONS
    return bool(comma) and not blanks


def _read_annotations(path: Path, lines: Sequence[str]) -> list[tuple[str, str]]:
    present = {Path(file).stem: file for file in list_images(path.parent, EXTENSIONS)}
    pairs, missing = [], 0
    reader = csv.DictReader(lines, skipinitialspace=True)
    lacking = [name for name in ANNOTATION_COLUMNS if name not in (reader.fieldnames or ())]
    if lacking:
        raise UserError(f"{path} has no column {lacking[0]}: give Kinetics' lists, or lines of a path and a label")
    for row in reader:
        try:
            start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
        except (TypeError, ValueError, OverflowError):  # a truncated row has None here
            start = end = -1
        name = row["youtube_id"]
        if not row["label"] or not name or min(start, end) < 0:
            line = lines[reader.line_num - 1]
            raise UserError(
                f"the line {line[:80]!r} of {path} must have a label, a youtube_id and two times in seconds: mend or"
                " remove it"
            )
        clip = f"{name}_{start:06d}_{end:06d}"
        file = present.get(clip, present.get(name))
        if file is None:
            missing += 1
        else:
            pairs.append((file, row["label"]))
    if missing:
        logger.warning("%d of the %d videos of %s are not there and left out", missing, missing + len(pairs), path)
    return pairs


MOTIONS = ("moves left", "moves right", "moves up", "moves down", "shrinks", "grows")


class MovingDigits(MapSource):
    """Clips of a bright digit moving over a dark, grainy background; the class is its motion, one of `MOTIONS`.

    A single frame never reveals the class. At every moment the digit's position and size are uniformly distributed
    whatever the motion, because each of them is cyclic: a digit that leaves on one side re-enters on the other, and the
    largest size is followed by the smallest. Digit, colours, speed and starting point are random.

    Clip i of a split is always the same, drawn from (split, i): 16 frames of 48 x 48 pixels. Clips of "train" (1600
    unless `count` is given) use only the training digits of `Digits`, and those of "val" (240) only the others. Do not
    flip these clips in augmentation: a flip would change the class.
    """

    frames, side = 16, 48
    smallest, largest = 15.0, 30.0  # side in clip pixels of the 8x8 image that contains the digit
    travel = 0.3, 0.6  # share of a full cycle per clip
    counts = {"train": 1600, "val": 240}  # noqa: RUF012

    def __init__(self, split: str, count: int | None = None) -> None:
        check_split(split)
        super().__init__(f"moving digits/{split}", MOTIONS)
        splits = ("train", "val") if split == "all" else (split,)
        self.mean, self.std = MEAN, STD
        self.crop_pct = 1.0
        self.digits = {part: Digits(part).images for part in splits}
        self.clips = [(part, index) for part in splits for index in range(count or self.counts[part])]

    def __len__(self) -> int:
        return len(self.clips)

    def _item(self, index: int) -> Item:
        part, number = self.clips[index]
        label = number % len(MOTIONS)
        return Item(f"moving digits/{part}/{number:05d}", self._draw(part, number, label), label)

    def _draw(self, part: str, number: int, label: int) -> np.ndarray:
        """Draw the clip, uint8 (T, H, W, 3)."""
        rng = np.random.default_rng([list(self.counts).index(part), number])
        glyph = Image.fromarray(np.pad(self.digits[part][rng.integers(len(self.digits[part]))], 1))
        # Horizontal position, vertical position and size, each as a fraction of its cycle.
        ways = np.tile(rng.random(3), (self.frames, 1))
        ways[:, label // 2] += np.linspace(0, rng.uniform(*self.travel), self.frames) * (1 if label % 2 else -1)
        coverage = np.stack([self._coverage(glyph, *way) for way in ways % 1])[..., None]
        # Levels that leave room for the grain.
        ground, colour = (rng.uniform(*levels, 3).astype(np.float32) for levels in ((0, 64), (128, 224)))
        clip = (ground + coverage * (colour - ground)).astype(np.uint8)
        clip += np.frombuffer(rng.bytes(clip.size), dtype=np.uint8).reshape(clip.shape) & 31
        return clip

    def _coverage(self, glyph: Image.Image, x: float, y: float, size: float) -> np.ndarray:
        """Draw the digit on a canvas that wraps around in both directions: float32 (side, side) from 0 to 1."""
        scale = 8 / (self.smallest * (self.largest / self.smallest) ** size)
        # Draw it in the middle with its subpixel offset, then roll it into place.
        left, top = (glyph.width / 2 - scale * (self.side // 2 + self.side * way % 1) for way in (x, y))
        where = (scale, 0, left, 0, scale, top)
        drawn = glyph.transform((self.side, self.side), Image.Transform.AFFINE, where, Image.Resampling.BILINEAR)
        shift = int(self.side * y) - self.side // 2, int(self.side * x) - self.side // 2
        return np.roll(np.asarray(drawn), shift, (0, 1)).astype(np.float32) / 255
