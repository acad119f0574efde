"""Segmentation datasets: images with a class for every pixel, and how their masks encode the classes.

One file, though long: it holds every layout in which images and masks come.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from anyres.data.base import Item, MapSource
from anyres.data.classes import check_classes
from anyres.data.composed import Scenes
from anyres.data.decode import MAX_PIXELS, BadImage, Data, load_indices
from anyres.data.huggingface import cell, open_table, rows
from anyres.data.listing import list_images
from anyres.data.sources import check_beside_splits, folders, held_out
from anyres.data.splits import TRAIN_NAMES, VALIDATION_NAMES, check_split, find_split
from anyres.errors import UserError
from anyres.io.parsing import read_text
from anyres.shapes import Size

logger = logging.getLogger(__name__)

LOOKED_AT = 512
"""Maximum number of training masks that `check_masks` searches for classes without labelled pixels."""
IGNORED = 255
"""Label of pixels that are ignored in training and in evaluation."""

ADE20K_CLASSES = 150
MASK_FOLDERS = ("annotations", "masks", "labels")
MASK_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp")  # lossless; other formats may change the stored values
NAME_FILES = ("objectInfo150.txt", "classes.txt", "names.txt")
MASK_COLUMNS = ("label", "annotation", "mask", "segmentation", "labels", "annotations", "masks", "segmentation_mask")


class Mask(NamedTuple):
    """The undecoded mask of an image: the label of an `Item`.

    `table` (256,) int16 maps each stored value to a class, to IGNORED, or to a negative number if the value means
    nothing.
    """

    data: Data
    table: np.ndarray

    def labels(self, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Decode the mask to class numbers and IGNORED, (H, W) uint8.

        Raises BadImage if the file cannot be read. Raises UserError if the mask has colours, or a value that is neither
        a class nor IGNORED: the mask settings are then wrong, so skipping such masks would hide the mistake.
        """
        place = f" {self.data}" if isinstance(self.data, Path) else ""
        try:
            values = load_indices(self.data, f"the mask{place} of {name}", max_pixels)
        except BadImage as error:
            raise BadImage(name, f"its mask{place} cannot be used: {error.reason}") from error
        stored = values.astype(np.uint8)
        labels = self.table[stored]
        wrong, counts = np.unique(values[(labels < 0) | (stored != values)], return_counts=True)
        if len(wrong):
            known = np.count_nonzero((self.table >= 0) & (self.table != IGNORED))
            others = f" (and {len(wrong) - 1} other values in {counts[1:].sum()})" if len(wrong) > 1 else ""
            raise UserError(
                f"the mask{place} of {name} holds the value {wrong[0]} in {counts[0]} pixels{others}, which is none of"
                f" the {known} classes and not ignored: correct the mask, or say what its values mean with num_classes,"
                " reduce_zero_label or mask_values"
            )
        return labels.astype(np.uint8)


class SegmentationSource(MapSource):
    """Base class of segmentation sources, whose items have a `Mask` as their label.

    By default a mask stores class numbers from 0, and 255 for ignored pixels. With `reduce_zero_label` it stores class
    numbers from 1, and 0 is ignored too (ADE20K). `mask_values` gives the stored value of each class instead. Raises
    UserError if there are more classes than a byte can distinguish, or if `mask_values` contradicts the other
    arguments.
    """

    def __init__(
        self,
        name: str,
        label_names: Sequence[str],
        in_chans: int,
        reduce_zero_label: bool = False,
        mask_values: Sequence[int] = (),
    ) -> None:
        super().__init__(name, label_names, in_chans)
        most = IGNORED - reduce_zero_label
        check_classes(label_names, name)
        if len(label_names) > most:
            raise UserError(f"{name} with {len(label_names)} classes is not possible: masks tell 2 to {most} apart")
        values = list(mask_values) or [place + reduce_zero_label for place in range(len(label_names))]
        unfit = (
            reduce_zero_label or len(set(values)) != len(label_names) or not all(0 <= value <= 255 for value in values)
        )
        if mask_values and (unfit or len(values) != len(label_names)):
            raise UserError(
                f"mask_values {', '.join(map(str, values))} must be {len(label_names)} different numbers from 0 to 255,"
                f" one for each class of {name}, and reduce_zero_label off"
            )
        self.table = np.full(256, -1, dtype=np.int16)
        self.table[[IGNORED, *[0] * reduce_zero_label]] = IGNORED
        self.table[values] = np.arange(len(values))

    def use_labels(self, label_names: Sequence[str]) -> None:
        """Renumber the labels as in `Source`; at most 255 names."""
        if len(label_names) > IGNORED:
            raise UserError(f"{len(label_names)} labels are more than the {IGNORED} that masks tell apart: use fewer")
        super().use_labels(label_names)
        assert self._relabel is not None
        moved = np.arange(256, dtype=np.int16)
        moved[list(self._relabel)] = list(self._relabel.values())
        self.table = np.where(self.table < 0, self.table, moved[self.table])

    def _labelled(self, item: Item) -> Item:
        return item._replace(label=Mask(item.label, self.table))

    def _marked(self, item: Item) -> Size:
        labels: np.ndarray = item.label.labels(item.name)
        return labels.shape[0], labels.shape[1]


def open_segmentation(
    spec: str | os.PathLike[str],
    split: str = "train",
    *,
    num_classes: int | None = None,
    reduce_zero_label: bool | None = None,
    mask_values: Sequence[int] = (),
    in_chans: int = 3,
    label_names: Sequence[str] | None = None,
    whole: bool = False,
) -> SegmentationSource:
    """Open a segmentation dataset for `split` "train", "val" or "all".

    `spec` is one of

    - "digits": scenes composed of handwritten digits, drawn on demand, with 11 classes: background and the digits
      ("train" and "val" only);
    - a folder FOLDER/images/train/*.jpg with FOLDER/masks/train/*.png (or annotations, labels) and the same for val
      (other accepted names are in `data.splits`); FOLDER/train/images with FOLDER/train/masks; or FOLDER/images/*.jpg
      with FOLDER/masks/*.png, where a fixed tenth of the images is the validation split. A mask has the same name as
      its image. FOLDER/images/training with FOLDER/annotations/training is ADE20K's layout, whose masks store 1 to 150,
      and 0 for everything else;
    - "hf:NAME" or "hf:NAME@CONFIG": a Hugging Face dataset by hub id or local folder, with an image column and one of
      masks called label, annotation, mask or segmentation.

    Masks store the class number of each pixel, from 0, as a palette index or grey value; 255 is ignored. With
    `reduce_zero_label`, class numbers start at 1, and 0 is ignored too; this is the default only for 150 classes in
    ADE20K's layout. `mask_values` are the stored values of the classes, in order: 0, 255 for black-and-white masks. 255
    is ignored unless it is one of them. `num_classes` is needed unless `mask_values` is given, the folder names the
    classes (one per line in classes.txt or names.txt, or ADE20K's objectInfo150.txt), or it has ADE20K's layout.
    `label_names` numbers the classes by a given list, such as a checkpoint's. `whole` reads all of a dataset without
    splits instead of a share. Masks are checked when read; see also `check_masks`.

    Raises UserError or FileNotFoundError if something is missing.
    """
    text = os.fspath(spec)
    source: SegmentationSource
    if text == "digits":
        if num_classes not in (None, 11) or reduce_zero_label or mask_values:
            raise UserError("digits has 11 classes, the first is the background: leave out num_classes and the rest")
        source = ComposedDigits(split, in_chans)
    elif text.startswith("hf:"):
        name, zero = text.removeprefix("hf:"), bool(reduce_zero_label)
        source = _Table(name, split, in_chans, num_classes, zero, mask_values, whole=whole)
    else:
        source = MaskFolder(text, split, in_chans, num_classes, reduce_zero_label, mask_values, whole=whole)
    if label_names is not None and list(label_names) != source.label_names:
        source.use_labels(label_names)
    return source


def check_masks(source: SegmentationSource) -> None:
    """Check the masks of a training set for classes without labelled pixels.

    Masks are read in a fixed random order until every class has been seen, but at most `LOOKED_AT` of them. If fewer
    than two classes have been seen by then, reading continues until a second one turns up. Classes that were not seen
    are named in the log. Raises UserError if fewer than two classes have labelled pixels, or if a mask has a value that
    means nothing. Unreadable masks are left to the loader, which counts them.
    """
    counts = np.zeros(IGNORED + 1, dtype=np.int64)
    looked = 0
    for index in np.random.default_rng(0).permutation(len(source)).tolist():
        seen = np.count_nonzero(counts[:IGNORED])
        if seen == len(source.label_names) or (seen > 1 and looked >= LOOKED_AT):
            break
        item = source.item(index)
        try:
            counts += np.bincount(item.label.labels(item.name).ravel(), minlength=len(counts))
            looked += 1
        except BadImage:
            continue
    names = list(map(repr, source.label_names))
    found, missing = ([name for place, name in enumerate(names) if bool(counts[place]) == has] for has in (True, False))
    if len(found) < 2:
        raise UserError(
            f"{', '.join(found) or 'no class'} alone has labelled pixels in the {looked} masks of {source.name}"
            f" ({100 * counts[IGNORED] / max(counts.sum(), 1):.1f} % of all pixels are ignored, {', '.join(missing)}"
            " has none): label two classes or more; if the masks are black and white, 0 and 255, give mask_values=0,255"
        )
    if missing:
        logger.warning(
            "no pixel is labelled %s in the %d of %d masks of %s that were looked at",
            " or ".join(missing),
            looked,
            len(source),
            source.name,
        )


class ComposedDigits(SegmentationSource):
    """`Scenes` as a segmentation dataset: class 0 is the background, class 1 + d is digit d."""

    def __init__(self, split: str, in_chans: int = 3) -> None:
        super().__init__(f"digits/{split}", ["background", *map(str, range(10))], in_chans)
        self.scenes = Scenes(split)

    def __len__(self) -> int:
        return len(self.scenes)

    def _item(self, index: int) -> Item:
        scene = self.scenes.scene(index)
        return Item(f"{self.name}/{index:04d}", scene.image, scene.classes)


class MaskFolder(SegmentationSource):
    """A folder of images and one of masks (see `open_segmentation`). Hidden files are ignored."""

    def __init__(
        self,
        folder: str,
        split: str,
        in_chans: int = 3,
        num_classes: int | None = None,
        reduce_zero_label: bool | None = None,
        mask_values: Sequence[int] = (),
        *,
        whole: bool = False,
    ) -> None:
        check_split(split)
        root = Path(folder)
        if not root.is_dir():
            raise FileNotFoundError(
                f"there is no folder {folder!r}: give digits, a folder of images and masks, or hf:NAME"
            )
        parts = _parts(root, split, whole)
        ade20k = (root / "annotations" / "training").is_dir()
        names = class_names(root)
        if num_classes is None:
            num_classes = len(mask_values) or len(names) or (ADE20K_CLASSES if ade20k else None)
        if num_classes is None:
            raise UserError(f"{folder} does not say how many classes it has: set num_classes, or add a classes.txt")
        if names and len(names) != num_classes:
            raise UserError(f"{folder} names {len(names)} classes, and num_classes is {num_classes}: make them agree")
        if reduce_zero_label is None:
            reduce_zero_label = not mask_values and ade20k and num_classes == ADE20K_CLASSES
        names = names or [str(place) for place in range(num_classes)]
        super().__init__(f"{folder}/{split}", names, in_chans, reduce_zero_label, mask_values)
        pairs = [pair for images, masks, share in parts for pair in _pairs(root, images, masks, share)]
        if not pairs:
            raise UserError(f"{root / parts[0][0]} has no images for the {split} split: add some")
        self.root = root
        # One array of bytes, as in ImageFolder.
        self.files = np.array([tuple(os.fsencode(file) for file in pair) for pair in pairs])

    def __len__(self) -> int:
        return len(self.files)

    def paths(self) -> Iterator[str]:
        return (os.path.join(self.root, os.fsdecode(image)) for image, _ in self.files)

    def _item(self, index: int) -> Item:
        image, mask = (os.fsdecode(file) for file in self.files[index])
        return Item(image, self.root / image, self.root / mask)


def _parts(root: Path, split: str, whole: bool) -> list[tuple[str, str, str]]:
    """Return (image folder, mask folder, share to read) for each part of a split; folders are relative to the root."""
    found = {part: _part(root, part) for part in ("train", "val")}
    marks = _marks(root)
    if found["train"] is None and found["val"] is None:
        if marks is None:
            raise FileNotFoundError(
                f"{root} must have a folder images and one of {', '.join(MASK_FOLDERS)}, as in {root}/images/train and "
                f"{root}/masks/train (or {root}/train/images and {root}/train/masks)"
            )
        return [("images", marks, "all" if whole else split)]
    check_beside_splits(root / "images" if marks else root, "put all images into the splits")
    parts = []
    for part in found if split == "all" else [split]:
        pair = found[part]
        if pair is None:
            raise FileNotFoundError(
                f"{root / 'images' if marks else root} has no folder for the {part} split (one of "
                f"{', '.join(TRAIN_NAMES if part == 'train' else VALIDATION_NAMES)}): add one"
            )
        parts.append((*pair, "all"))
    return parts


def _part(root: Path, part: str) -> tuple[str, str] | None:
    """Return the image and mask folders of a split: images/PART and masks/PART, or PART/images and PART/masks."""
    marks = _marks(root)
    if marks is not None:
        name = find_split(folders(root / "images"), part)
        masks = find_split(folders(root / marks), part)
        return None if name is None else (f"images/{name}", f"{marks}/{masks or name}")
    name = find_split(folders(root), part)
    marks = None if name is None else _marks(root / name)
    return None if marks is None else (f"{name}/images", f"{name}/{marks}")


def _marks(folder: Path) -> str | None:
    """Return the name of the mask folder next to a folder called images, or None."""
    if not (folder / "images").is_dir():
        return None
    return next((name for name in MASK_FOLDERS if (folder / name).is_dir()), None)


def _pairs(root: Path, image_folder: str, mask_folder: str, share: str) -> list[tuple[str, str]]:
    """Return the images of a folder with their masks, as paths relative to the root."""
    images, masks = root / image_folder, root / mask_folder
    if not masks.is_dir():
        raise FileNotFoundError(f"there is no folder {masks} with the masks of {images}: add it")
    files = list_images(images)
    by_stem: dict[str, str] = {}
    # Not with `list_images`, which lists a mask once: several images may share one mask through links.
    for inside in {os.path.dirname(file) for file in files}:
        for name in sorted(os.listdir(masks / inside), reverse=True) if (masks / inside).is_dir() else ():
            if name.lower().endswith(MASK_EXTENSIONS) and (masks / inside / name).is_file():
                file = os.path.join(inside, name).replace(os.sep, "/")
                by_stem[os.path.splitext(file)[0]] = file
    alone = [file for file in files if os.path.splitext(file)[0] not in by_stem]
    if alone:
        raise UserError(
            f"{len(alone)} of {len(files)} images of {images} have no mask in {masks}, the first is {alone[0]}: add a "
            "PNG of the same name, or remove the image"
        )
    if share != "all":
        lowest = held_out(files)
        files = [file for file in files if (file in lowest) == (share == "val")]
    return [(f"{image_folder}/{file}", f"{mask_folder}/{by_stem[os.path.splitext(file)[0]]}") for file in files]


def class_names(root: Path) -> list[str]:
    """Return the class names that the folder provides, or an empty list."""
    file = next((root / name for name in NAME_FILES if (root / name).is_file()), None)
    if file is None:
        return []
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if file.name == NAME_FILES[0]:  # a table with a header line and the name in the last column
        return [line.split("\t")[-1].strip() for line in lines[1:]]
    return [line.strip() for line in lines]


class _Table(SegmentationSource):
    """A Hugging Face dataset with an image column and a mask column."""

    def __init__(
        self,
        name: str,
        split: str,
        in_chans: int,
        num_classes: int | None,
        reduce_zero_label: bool,
        mask_values: Sequence[int],
        *,
        whole: bool = False,
    ) -> None:
        datasets, table, share = open_table(name, split, whole=whole)
        pictures = [key for key, feature in table.features.items() if isinstance(feature, datasets.Image)]
        self.mask = next((key for key in MASK_COLUMNS if key in pictures), "")
        self.image = next((key for key in pictures if key != self.mask), "")
        if not self.mask or not self.image:
            missing = "image column" if self.mask else f"mask column ({', '.join(MASK_COLUMNS[:4])})"
            raise UserError(f"dataset hf:{name} has no {missing} among its images {', '.join(pictures) or '(none)'}")
        num_classes = num_classes or len(mask_values) or None
        if num_classes is None:
            raise UserError(f"dataset hf:{name} does not say how many classes its masks have: set num_classes")
        super().__init__(
            f"hf:{name}/{split}", list(map(str, range(num_classes))), in_chans, reduce_zero_label, mask_values
        )
        undecoded = datasets.Image(decode=False)
        table = table.select_columns([self.image, self.mask])
        self.table_rows = table.cast_column(self.image, undecoded).cast_column(self.mask, undecoded)
        self.indices = rows(len(table), share)
        if not len(self.indices):
            raise UserError(f"dataset {self.name} holds no images for this split: it has {len(table)} in all")

    def __len__(self) -> int:
        return len(self.indices)

    def _item(self, index: int) -> Item:
        place = int(self.indices[index])
        row, name = self.table_rows[place], f"{self.name}[{place}]"
        return Item(name, cell(row[self.image], name), cell(row[self.mask], name, "mask"))
