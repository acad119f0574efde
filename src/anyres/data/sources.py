"""Opening classification datasets, with the digits and image folders; other formats have their own files."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anyres.data.base import Item, MapSource, StreamSource
from anyres.data.classes import check_classes, match_classes, tell_subset
from anyres.data.huggingface import open_huggingface
from anyres.data.letters import Letters
from anyres.data.listing import EXTENSIONS, list_images
from anyres.data.shards import Shards
from anyres.data.splits import VALIDATION_NAMES, check_split, differ_by_split, find_split, looks_like_split
from anyres.errors import UserError

HELD_OUT = 0.1


def open_source(
    spec: str | os.PathLike[str],
    split: str = "train",
    *,
    in_chans: int | None = None,
    label_names: Sequence[str] | None = None,
    whole: bool = False,
) -> MapSource | StreamSource:
    """Open a classification dataset for `split` "train", "val" or "all".

    `spec` is one of

    - "digits": the 1797 handwritten digits, 8x8 pixels, that come with scikit-learn: 1437 train, 360 val;
    - "letters": letters in many fonts, drawn on demand at up to 256 pixels: 2600 train, 1040 val;
    - a folder FOLDER/train/CLASS/*.jpg with FOLDER/val/CLASS/*.jpg; or FOLDER/CLASS/*.jpg, where a fixed tenth of each
      class is the validation split;
    - "hf:NAME" or "hf:NAME@CONFIG": a Hugging Face dataset by hub id or local folder; "hf-stream:…" reads it as a
      stream;
    - "wds:PATTERN": WebDataset shards, where PATTERN may contain `*`, `{000..146}`, `{a,b}` and `{split}`.

    `in_chans` is 1 for grey and 3 for RGB images; by default it is what the source stores, or RGB for files.
    `label_names` numbers the classes by a given list, such as a checkpoint's, instead of the source's own order.
    `whole` reads everything if the dataset has no splits of its own, instead of a "train" or "val" share.

    Raises UserError or FileNotFoundError with a message that says what is missing.
    """
    text = os.fspath(spec)
    source: MapSource | StreamSource
    if text == "digits":
        source = Digits(split, in_chans or 1)
    elif text == "letters":
        source = Letters(split, in_chans or 3)
    elif text.startswith(("hf:", "hf-stream:")):
        kind, _, name = text.partition(":")
        streaming = kind == "hf-stream"
        source = open_huggingface(name, split, in_chans or 3, streaming, label_names=label_names, whole=whole)
    elif text.startswith("wds:"):
        source = Shards(text.removeprefix("wds:"), split, in_chans or 3, whole=whole)
    else:
        source = ImageFolder(text, split, in_chans or 3, whole=whole)
    check_classes(source.label_names, source.name)
    if label_names is not None and list(label_names) != source.label_names:
        source.use_labels(label_names)
    return source


class Digits(MapSource):
    """scikit-learn's handwritten digits (UCI, test part): 1797 grey 8x8 images of ten classes, white on black.

    The images are sorted by class, keeping the order of the file within a class. Every fifth of the 1797 is for
    validation, which gives 360 validation and 1437 training images with the same share of every class. The mean is 0,
    so that the black background becomes exactly the zero that models pad with. The scale is the root mean square of all
    pixels, so that they have unit power.
    """

    def __init__(self, split: str, in_chans: int = 1) -> None:
        check_split(split)
        super().__init__(f"digits/{split}", [str(digit) for digit in range(10)], in_chans)
        table = _digits_table()
        images, labels = table[:, :64].reshape(-1, 8, 8), table[:, 64]
        by_class = np.argsort(labels, kind="stable")
        held_out = np.zeros(len(by_class), dtype=bool)
        held_out[by_class[::5]] = True
        chosen = {"train": ~held_out, "val": held_out, "all": np.ones_like(held_out)}[split]
        self.indices = np.flatnonzero(chosen)
        self.images = np.rint(images[self.indices] * (255 / 16)).astype(np.uint8)
        self.labels = labels[self.indices]
        self.mean, self.std = (0.0,) * in_chans, (0.484,) * in_chans
        self.crop_pct = 1.0  # the digits fill their 8x8 pixels

    def __len__(self) -> int:
        return len(self.images)

    def _item(self, index: int) -> Item:
        return Item(f"digits/{self.indices[index]:04d}", self.images[index], int(self.labels[index]))


def _digits_table() -> np.ndarray:
    """Return scikit-learn's digits as (1797, 65): 64 pixel values from 0 to 16, then the class.

    The package's data file is read directly, which takes 20 ms; importing `sklearn.datasets` takes seconds.
    """
    package = importlib.util.find_spec("sklearn")
    for folder in (package.submodule_search_locations or ()) if package is not None else ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",", dtype=np.uint8)
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.uint8)


class ImageFolder(MapSource):
    """Images in one folder per class. Classes are numbered in sorted order; hidden and non-image files are ignored.

    If there is a folder FOLDER/train (or training, in any case), the classes are its folders, and the validation split
    is FOLDER/val or the first of `VALIDATION_NAMES` that exists. Without folders for splits, the classes are the
    folders of FOLDER, and the tenth of each class with the lowest hashed names is for validation (nothing from a class
    with one image); `whole` reads everything. Folders named like splits are never classes.
    """

    extensions = EXTENSIONS
    kind = "image"

    def __init__(self, folder: str, split: str, in_chans: int = 3, *, whole: bool = False) -> None:
        check_split(split)
        super().__init__(folder, [], in_chans)
        root = Path(folder)
        if not root.exists():
            raise FileNotFoundError(
                f"there is no dataset {folder!r}: give digits, letters, an image folder, hf:NAME, hf-stream:NAME or "
                "wds:PATTERN"
            )
        if not root.is_dir():
            raise UserError(
                f"dataset {folder!r} is a file: give the folder that holds one folder of {self.kind}s per class"
            )
        parts = self._parts(root, split, whole)
        home = self._train_folder(root) or parts[0][0]
        self.label_names = _class_names(home, self.kind)
        files: list[str] = []
        labels: list[int] = []
        for part, share in parts:
            names, whose = folders(part), {"knower": str(home), "namer": str(part)}
            places = match_classes(self.label_names, names, **whose, fix="Give both the same class folders")
            tell_subset(self.label_names, places, **whose)
            check_apart(part, names)
            for class_name, place in zip(names, places, strict=True):
                inside = self._class_files(part / class_name, share)
                prefix = f"{part.relative_to(root).as_posix()}/{class_name}/" if part != root else f"{class_name}/"
                files.extend(prefix + file for file in inside)
                labels.extend([place] * len(inside))
        if not files:
            raise UserError(
                f"no class of {folder} has a second {self.kind} for the {split} split: add some, or a folder val"
            )
        self.root = root
        # One array of bytes: a list of a million strings would be copied into every worker as soon as it is touched
        # (copy-on-write).
        self.files = np.array([os.fsencode(file) for file in files])
        self.labels = np.array(labels)

    def _train_folder(self, root: Path) -> Path | None:
        name = find_split(folders(root), "train")
        return None if name is None else root / name

    def _parts(self, root: Path, split: str, whole: bool) -> list[tuple[Path, str]]:
        """Return the folders of classes that a split reads, and the share of each to use."""
        inside = folders(root)
        names = {part: find_split(inside, part) for part in ("train", "val")}
        splits = [name for name in inside if looks_like_split(name)]
        if not splits:
            if differ_by_split(inside):
                raise UserError(
                    f"the folders {', '.join(inside[:4])} of {root} look like parts of a dataset: rename them to train"
                    " and val"
                )
            return [(root, "all" if whole else split)]
        check_beside_splits(
            root, f"give folders train and val with one folder of {self.kind}s per class", self.extensions
        )
        wanted = ("train", "val") if split == "all" else (split,)
        for part in wanted:
            if names[part] is None and split != "all":
                known = f"train or training; {splits[0]} is there" if part == "train" else ", ".join(VALIDATION_NAMES)
                raise FileNotFoundError(
                    f"{root} has no folder for the {part} split (one of {known}): add one, or give {root / splits[0]} "
                    "to hold out a tenth of it"
                )
        return [(root / name, "all") for part in wanted if (name := names[part]) is not None]

    def _class_files(self, folder: Path, share: str) -> list[str]:
        inside = list_images(folder, self.extensions)
        if not inside:
            raise UserError(f"class folder {folder} holds no {self.kind}s: add some or remove the folder")
        if share == "all":
            return inside
        lowest = held_out(inside)
        return [file for file in inside if (file in lowest) == (share == "val")]

    def __len__(self) -> int:
        return len(self.files)

    def paths(self) -> Iterator[str]:
        return (os.path.join(self.root, os.fsdecode(file)) for file in self.files)

    def _item(self, index: int) -> Item:
        file = os.fsdecode(self.files[index])
        return Item(file, self.root / file, int(self.labels[index]))


def shared_files(one: Any, other: Any) -> list[str]:
    """Return the files of `one` that are also in `other`, possibly through links; nothing if they have no files."""
    numbers = {(status.st_dev, status.st_ino) for path in other.paths() if (status := _status(path))}
    alike = [path for path in one.paths() if (status := _status(path)) and (status.st_dev, status.st_ino) in numbers]
    if not alike:
        return []
    # Some file systems give the same inode number to several files, so compare real paths as well.
    real = {os.path.realpath(path) for path in other.paths() if _status(path)}
    return [path for path in alike if os.path.realpath(path) in real or os.stat(path).st_nlink > 1]


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):  # missing, or a null byte in its name: reported when it is read
        return None


def folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder`, without hidden ones and links to it or its parents."""
    home = folder.resolve()
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".")
        if not (path.is_symlink() and home.is_relative_to(path.resolve()))
    )


def check_apart(folder: Path, names: Sequence[str]) -> None:
    """Raise UserError if two class folders are the same folder through a link: its files would have two labels."""
    real: dict[Path, str] = {}
    for name in names:
        other = real.setdefault((folder / name).resolve(), name)
        if other != name:
            raise UserError(f"the classes {other} and {name} of {folder} are one folder by a link: remove the link")


def check_beside_splits(folder: Path, fix: str, extensions: Collection[str] = EXTENSIONS) -> None:
    """Raise UserError if there are folders with images next to the split folders.

    They would be left out, or else they are the classes and the split folders are classes too.
    """
    names = folders(folder)
    split = next(filter(looks_like_split, names))
    others = (name for name in names if not looks_like_split(name) and list_images(folder / name, extensions))
    if (other := next(others, None)) is not None:
        raise UserError(
            f"{folder} has a folder {split}, which looks like a part of a dataset, beside {other}, which does not: "
            f"{fix}, or rename {split}"
        )


def _class_names(folder: Path, kind: str) -> list[str]:
    """Return the names of the class folders; there must be at least two."""
    names = folders(folder)
    if not names:
        raise UserError(f"{folder} holds no class folders: expected {folder}/CLASS/FILE or {folder}/train/CLASS/FILE")
    check_classes(names, f"{folder} (one folder of {kind}s per class)")
    return names


def held_out(files: Sequence[str]) -> set[str]:
    """Return the tenth of the files with the lowest hashed names: at least one, but never the only one."""
    count = max(1, round(len(files) * HELD_OUT)) if len(files) > 1 else 0
    return set(sorted(files, key=_hash)[:count])


def _hash(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()
