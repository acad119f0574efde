"""Hugging Face datasets, by hub id or from a local folder, with random access or as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anyres.data.base import Item, MapSource, StreamSource
from anyres.data.classes import name_labels
from anyres.data.decode import BadImage, Data
from anyres.data.seeding import generator
from anyres.data.splits import check_split, find_split
from anyres.errors import UserError
from anyres.extras import require

SHUFFLE_BUFFER = 1000
MAX_SHARDS = 64
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "cls")


def open_huggingface(
    name: str,
    split: str,
    in_chans: int,
    streaming: bool,
    label_names: Sequence[str] | None = None,
    whole: bool = False,
) -> MapSource | StreamSource:
    """Open the Hugging Face dataset NAME or NAME@CONFIG.

    NAME is a hub id, a folder written by `save_to_disk`, or a folder of images or parquet files. If a dataset has no
    validation split (see `data.splits`), every tenth image is held out, unless `whole`. A stream must have a validation
    split. Labels are the names of the ClassLabel column. If the column contains integers, they serve as names; a stream
    then has as many classes as there are `label_names`. Raises UserError.
    """
    datasets, table, share = open_table(name, split, streaming, whole)
    if streaming:
        return _Stream(datasets, f"hf-stream:{name}/{split}", table, share, in_chans, len(label_names or ()))
    return _Table(datasets, f"hf:{name}/{split}", table, share, in_chans)


def open_table(name: str, split: str, streaming: bool = False, whole: bool = False) -> tuple[Any, Any, str]:
    """Return the package `datasets`, the table of a split of NAME or NAME@CONFIG, and the share of it to use.

    The share is "all", or "train" or "val" if every tenth row is held out (see `rows`), which `whole` turns off. Raises
    UserError.
    """
    check_split(split)
    datasets = require("datasets")
    path, config = (name, None) if Path(name).exists() else _split_config(name)
    try:
        saved = (Path(path) / "dataset_dict.json").is_file() or (Path(path) / "state.json").is_file()
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, config, streaming=streaming)
    except Exception as error:  # any kind (OSError, ValueError, …) means "cannot be opened"
        raise UserError(f"cannot open the Hugging Face dataset {name!r}: {_first_line(error)}") from error
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    return datasets, *_pick_split(datasets, splits, name, split, whole)


def _split_config(name: str) -> tuple[str, str | None]:
    path, _, config = name.partition("@")
    return path, config or None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _pick_split(datasets: Any, splits: dict[str, Any], name: str, split: str, whole: bool) -> tuple[Any, str]:
    """Return the table and the share of it to use: "all", or "train" or "val" if every tenth image is held out."""
    names = {part: find_split(splits, part) for part in ("train", "val")}
    train, validation = (None if name is None else splits[name] for name in names.values())
    if split == "val" and validation is not None:
        return validation, "all"
    if train is None:
        if split == "all" and validation is not None:
            return validation, "all"
        raise UserError(
            f"dataset hf:{name} has no {split} split, only {', '.join(splits)}: name one of them train or validation"
        )
    if split == "all":
        return (train if validation is None else datasets.concatenate_datasets([train, validation])), "all"
    if validation is not None:
        return train, "all"
    return train, "all" if whole else split


def rows(count: int, share: str) -> np.ndarray:
    """Return the rows of a share of a table, spread evenly because tables are often sorted by class."""
    every = np.arange(count)
    held_out = every % 10 == 9
    return every if share == "all" else every[held_out if share == "val" else ~held_out]


def _columns(datasets: Any, features: Any, name: str) -> tuple[str, str]:
    """Find the image column and the label column."""
    if features is None:
        raise UserError(f"dataset {name} does not say what its columns hold: read it with hf: in place of hf-stream:")
    image = next((key for key, feature in features.items() if isinstance(feature, datasets.Image)), None)
    labels = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    numbers = [key for key, feature in features.items() if getattr(feature, "dtype", "").startswith(("int", "uint"))]
    label = next((key for key in LABEL_COLUMNS if key in labels), None) or next(iter(labels), None)
    label = label or next((key for key in LABEL_COLUMNS if key in numbers), None)
    if image is None or label is None:
        missing = "image" if image is None else "label"
        raise UserError(
            f"dataset {name} has no {missing} column among {', '.join(features)}: one image and one label column are"
            " needed"
        )
    return image, label


def cell(value: dict[str, Any] | None, name: str, kind: str = "image") -> Data:
    """Return the undecoded image in a cell of a table."""
    if value is None:
        return BadImage(name, f"the row holds no {kind}")
    return value["bytes"] if value.get("bytes") is not None else _fetch(value["path"], name)


def _row_item(name: str, row: dict[str, Any], image: str, label: str, classes: int) -> Item:
    data, place = cell(row[image], name), row[label]
    if place is None or place < 0:  # the library uses -1 for "no label", as in unlabelled test splits
        data, place = BadImage(name, "the row holds no label"), 0
    if place >= classes:
        raise UserError(f"{name} has the label {place}, and there are {classes} classes, from 0: correct the label")
    return Item(name, data, int(place))


def _fetch(path: str, name: str) -> Data:
    """Return a local path unchanged; read a remote file, such as hf://… in a streamed image folder."""
    if "://" not in path:
        return Path(path)
    import fsspec  # type: ignore[import-untyped]

    try:
        with fsspec.open(path, "rb") as handle:
            return bytes(handle.read())
    except (OSError, ValueError) as error:
        return BadImage(name, _first_line(error))


class _Table(MapSource):
    def __init__(self, datasets: Any, name: str, table: Any, share: str, in_chans: int) -> None:
        super().__init__(name, [], in_chans)
        self.image, self.label = _columns(datasets, table.features, name)
        # Not decoded by the library: files must pass our limits, and be decoded once at the scale that the views need.
        self.table = table.select_columns([self.image, self.label]).cast_column(
            self.image, datasets.Image(decode=False)
        )
        self.label_names = list(getattr(table.features[self.label], "names", None) or ())
        if not self.label_names:
            numbers = (number for number in self.table.unique(self.label) if number is not None and number >= 0)
            self.label_names = name_labels(set(map(str, numbers)), name)
        self.classes = len(self.label_names)
        self.indices = rows(len(table), share)
        if not len(self.indices):
            raise UserError(f"dataset {name} holds no images for this split: it has {len(table)} in all")

    def __len__(self) -> int:
        return len(self.indices)

    def _item(self, index: int) -> Item:
        row = int(self.indices[index])
        return _row_item(f"{self.name}[{row}]", self.table[row], self.image, self.label, self.classes)


class _Stream(StreamSource):
    def __init__(self, datasets: Any, name: str, table: Any, share: str, in_chans: int, numbers: int) -> None:
        super().__init__(name, [], in_chans)
        self.image, self.label = _columns(datasets, table.features, name)
        self.label_names = list(getattr(table.features[self.label], "names", None) or map(str, range(numbers)))
        if not self.label_names:
            raise UserError(
                f"dataset {name} numbers its classes without naming them: read it with hf:, which counts them"
            )
        self.classes = len(self.label_names)
        count = None
        if isinstance(table, datasets.Dataset):  # written by save_to_disk: local, so its length is known
            chosen = rows(len(table), share)
            count = len(chosen)
            table = table.select(chosen).to_iterable_dataset(num_shards=min(MAX_SHARDS, max(count, 1)))
        elif share == "val":
            raise UserError(
                f"dataset {name} has no validation split, and a stream cannot hold images out: read it with hf:"
            )
        self.table = table.select_columns([self.image, self.label]).cast_column(
            self.image, datasets.Image(decode=False)
        )
        splits = getattr(table.info, "splits", None) or {}
        known = splits.get(str(table.split)) if table.split is not None else None
        self.size = count or (known.num_examples or None if known is not None else None)

    def _items(self, epoch: int | None, seed: int, rank: int, world: int) -> Iterator[Item]:
        from datasets.distributed import split_dataset_by_node

        table = self.table
        if epoch is not None:
            table = table.shuffle(seed=generator("stream", seed, epoch).getrandbits(32), buffer_size=SHUFFLE_BUFFER)
        if world > 1:
            table = split_dataset_by_node(table, rank, world)
        of_epoch = "" if epoch is None else f" of epoch {epoch + 1}"
        for count, row in enumerate(table):
            path = (row[self.image] or {}).get("path") or f"{self.name}[{count * world + rank}{of_epoch}]"
            yield _row_item(path, row, self.image, self.label, self.classes)
