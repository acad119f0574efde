"""WebDataset shards: uncompressed tar files in which the files of each sample are stored next to each other.

The files of a sample share their name up to the first dot. The format is simple enough to read with the standard
library, which gives two things we need: an order that does not depend on the number of workers, and damaged members
that cost only one image. Remote shards are not supported; use hf-stream: for those.
"""

from __future__ import annotations

import glob
import itertools
import json
import random
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anyres.data.base import Item, StreamSource
from anyres.data.classes import NUMBER, name_labels, plain_number
from anyres.data.decode import BadImage, Data
from anyres.data.listing import EXTENSIONS
from anyres.data.seeding import generator
from anyres.data.splits import TRAIN_NAMES, VALIDATION_NAMES, check_split
from anyres.errors import UserError
from anyres.io.parsing import read_text

SHUFFLE_BUFFER = 1000
MAX_MEMBER_BYTES = 256 * 2**20
JSON_KEYS = ("label", "cls", "class", "class_id")


class Shards(StreamSource):
    """WebDataset samples with an image (.jpg, .png, …) and a class.

    The class is a number or a name: the content of .cls, or the field label, cls, class or class_id of .json. `{split}`
    in the pattern stands for the split names in `data.splits`, including capitalised ones. Without it, the tenth of the
    samples with the lowest hashed keys is the validation split, and `whole` reads everything.

    Class names are the lines of `classes.txt` next to the shards. If there is no such file, all shards are read once to
    collect the classes and the number of samples (about a minute per million). If there is one, the number of samples
    is taken from a webdataset shard index next to the shards (a .json file with `shardlist`), if any. Reading a class
    name that is not in `classes.txt`, or a number beyond its length, raises UserError.
    """

    def __init__(self, pattern: str, split: str, in_chans: int = 3, *, whole: bool = False) -> None:
        check_split(split)
        super().__init__(f"wds:{pattern}", [], in_chans)
        self.shards, share = _find(pattern, split)
        self.share = "all" if whole else share
        classes = self.shards[0].parent / "classes.txt"
        scanned: list[tuple[str, Any]] | None = None
        if classes.is_file():
            self.label_names = [line.strip() for line in read_text(classes).splitlines() if line.strip()]
        else:
            # Collect the classes from all samples, even if only a share is used: both shares must number them alike.
            scanned = [
                (key, _label(parts)) for shard in self.shards for key, parts in _samples(shard, pixels=False) if parts
            ]
            labels = {label for _, label in scanned if label is not None}
            if not labels:
                raise UserError(
                    f"{self.name} holds no samples with a class: each needs an image and a .cls or .json file"
                )
            self.label_names = name_labels(labels, self.name)
        self.places = {name: place for place, name in enumerate(self.label_names)}
        if not any(map(NUMBER.fullmatch, self.label_names)):  # named classes may also be given by number
            self.places |= {str(place): place for place in range(len(self.label_names))}
        if scanned is not None:
            self.size = sum(self._mine(key) for key, _ in scanned)
        elif self.share == "all":
            self.size = _indexed_size(self.shards)

    def _mine(self, key: str) -> bool:
        return self.share == "all" or (zlib.crc32(key.encode()) % 10 == 0) == (self.share == "val")

    def _items(self, epoch: int | None, seed: int, rank: int, world: int) -> Iterator[Item]:
        shards = list(self.shards)
        rng = generator("stream", seed, -1 if epoch is None else epoch)
        if epoch is not None:
            rng.shuffle(shards)
        # If there are enough shards, give each rank whole shards, so that no two ranks read the same data.
        whole = len(shards) >= world
        items = self._read(shards[rank::world] if whole else shards)
        if not whole:
            items = itertools.islice(items, rank, None, world)
        return items if epoch is None else _shuffled(items, rng)

    def _read(self, shards: Sequence[Path]) -> Iterator[Item]:
        for shard in shards:
            for key, parts in _samples(shard, pixels=True):
                name = f"{shard.name}/{key}"
                if parts is None:
                    yield Item(shard.name, BadImage(shard.name, "the shard is damaged, the rest of it is skipped"), 0)
                elif self._mine(key):
                    data, label = self._content(name, parts)
                    yield Item(name, data, label)

    def _content(self, name: str, parts: dict[str, bytes | None]) -> tuple[Data, int]:
        image = next((extension for extension in parts if extension in EXTENSIONS), None)
        text = _label(parts)
        if image is None:
            return BadImage(name, "the sample holds no image"), 0
        if text is None:
            return BadImage(name, "the sample holds no class (.cls or .json)"), 0
        label = self.places.get(text, self.places.get(plain_number(text)))
        if label is None:
            count = len(self.label_names)
            raise UserError(f"{name} is of the class {text[:40]!r}, none of the {count} of classes.txt: complete it")
        data = parts[image]
        if data is None:
            return BadImage(name, f"the file is larger than {MAX_MEMBER_BYTES >> 20} MiB"), label
        return data, label


def _find(pattern: str, split: str) -> tuple[list[Path], str]:
    """Return the shards in order, and the share of their samples to use."""
    choices: list[tuple[str, ...]] = [(split,)]
    if "{split}" in pattern:
        train, val = map(_spellings, (TRAIN_NAMES, VALIDATION_NAMES))
        choices = list(itertools.product(*{"train": [train], "val": [val], "all": [train, val]}[split]))
    for names in choices:
        found, missing = [], []
        for name in names:
            here, absent = _expand(pattern.replace("{split}", name))
            found.extend(here)
            missing.extend(absent)
        if found and not missing:
            return found, "all" if "{split}" in pattern else split
        if found and split != "all":
            raise FileNotFoundError(
                f"shard {missing[0]} does not exist: check the numbers in the braces of wds:{pattern}"
            )
    raise FileNotFoundError(f"no {split} shards match wds:{pattern}: check the folder and the names")


def _spellings(names: Sequence[str]) -> list[str]:
    return [form for name in names for form in (name, name.capitalize(), name.upper())]


def _expand(pattern: str) -> tuple[list[Path], list[str]]:
    """Expand braces ({000..146}, {a,b}), then `*`, `?` and `[…]`; return the existing paths and the missing ones."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        found = [Path(pattern)] if Path(pattern).is_file() else [Path(name) for name in sorted(glob.glob(pattern))]
        return found, [] if found else [pattern]
    span = re.fullmatch(r"([0-9]{1,6})\.\.([0-9]{1,6})", match[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        choices = match[1].split(",")
    parts = [_expand(pattern[: match.start()] + choice + pattern[match.end() :]) for choice in choices]
    return [path for found, _ in parts for path in found], [name for _, missing in parts for name in missing]


def _samples(shard: Path, pixels: bool) -> Iterator[tuple[str, dict[str, bytes | None] | None]]:
    """Yield (key, {extension: content}) for each sample, or (shard, None) where the shard is damaged.

    Without `pixels`, image contents are skipped, so only headers and labels are read. A content over the size limit is
    None.
    """
    key, parts = "", dict[str, bytes | None]()
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                if not stem:
                    continue  # hidden file
                stem, extension = (f"{folder}/{stem}" if folder else stem), f".{extension.lower()}"
                if stem != key:
                    if parts:
                        yield key, parts
                    key, parts = stem, {}
                if extension in EXTENSIONS and not pixels:
                    parts[extension] = b""
                elif member.size > MAX_MEMBER_BYTES:
                    parts[extension] = None
                elif extension in EXTENSIONS or extension in (".cls", ".json"):
                    handle = archive.extractfile(member)
                    parts[extension] = handle.read() if handle else None
    except (tarfile.TarError, EOFError, OSError):
        parts = {}  # the last sample may be incomplete
        yield str(shard), None
    if parts:
        yield key, parts


def _label(parts: dict[str, bytes | None]) -> str | None:
    """Return the class as written, without surrounding whitespace, or None."""
    if parts.get(".cls"):
        return (parts[".cls"] or b"").decode("utf-8", "replace").strip()
    try:
        fields = json.loads(parts.get(".json") or b"{}")
    except ValueError:
        return None
    value = next((fields[key] for key in JSON_KEYS if key in fields), None) if isinstance(fields, dict) else None
    return None if value is None or isinstance(value, bool | list | dict) else str(value)


def _indexed_size(shards: Sequence[Path]) -> int | None:
    """Return the sum of `nsamples` of these shards in the webdataset (`wids`) index files next to them, or None."""
    counts: dict[str, int] = {}
    for index in sorted(shards[0].parent.glob("*.json")):
        try:
            content = json.loads(read_text(index))
            counts.update((Path(shard["url"]).name, int(shard["nsamples"])) for shard in content["shardlist"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not an index file
    return sum(counts[shard.name] for shard in shards) if all(shard.name in counts for shard in shards) else None


def _shuffled(items: Iterator[Item], rng: random.Random) -> Iterator[Item]:
    """Shuffle with a buffer: each item is yielded when a later one replaces it."""
    buffer = list(itertools.islice(items, SHUFFLE_BUFFER))
    for item in items:
        place = rng.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = item
    rng.shuffle(buffer)
    yield from buffer
