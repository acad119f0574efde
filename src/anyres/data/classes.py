"""Matching the classes of a dataset to the outputs of a model, by name and never by position."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path

from anyres.errors import UserError
from anyres.io.parsing import read_text

logger = logging.getLogger(__name__)

NUMBER = re.compile(r"[0-9]{1,6}")
"""A class given by its number. Longer strings of digits are treated as names."""
NAMES_FILE = (
    "Rename the classes, or give the model's classes in a file with names=FILE, one on a line, in the order of its"
    " outputs"
)


def match_classes(
    known: Sequence[str], names: Sequence[str], *, knower: str, namer: str, fix: str = NAMES_FILE
) -> list[int]:
    """Return the index in `known` of the class that each of `names` refers to.

    A name matches if it is identical; otherwise if it is equal ignoring case, "_", "-" and spaces; otherwise if both
    are the same number ("02" is 2). A match counts only if it is unambiguous. `knower` and `namer` describe the owners
    of the two lists in error messages.

    Raises UserError, showing both lists and ending in `fix`, if a name has no match or if two names match the same
    class.
    """
    if list(known) == list(names):  # even if two classes share a name
        return list(range(len(names)))
    ways: list[Callable[[str], str | None]] = [str, _plain, _number]
    tables = [_places(known, way) for way in ways]
    places = [
        next((table[key] for way, table in zip(ways, tables, strict=True) if (key := way(name)) in table), -1)
        for name in names
    ]
    missing = [name for name, place in zip(names, places, strict=True) if place < 0]
    if missing or len(set(places)) < len(places):
        claims = Counter(places)
        twice = next((name for name, place in zip(names, places, strict=True) if claims[place] > 1), "")
        problem = (
            f"{len(missing)} of the {len(names)} classes of {namer} are not among the {len(known)} of {knower}, the "
            f"first is {missing[0]!r}"
            if missing
            else f"several classes of {namer} mean the same one of {knower}, such as {twice!r}"
        )
        raise UserError(f"{problem}: {namer} has {shown(names)}; {knower} has {shown(known)}. {fix}")
    return places


def tell_subset(known: Sequence[str], places: Collection[int], *, knower: str, namer: str) -> None:
    """Log which classes of `knower` are missing from `namer`, whose classes are at `places` in `known`."""
    absent = sorted(set(range(len(known))) - set(places))
    if absent:
        missing = ", ".join(f"{known[place]!r:.40}" for place in absent[:8]) + ", …" * (len(absent) > 8)
        logger.warning("%s has %d of the %d classes of %s, without %s", namer, len(places), len(known), knower, missing)


def name_labels(labels: Collection[str], where: str) -> list[str]:
    """Return the class names for a set of labels.

    If all labels are numbers, the classes are 0 to the largest of them; otherwise they are the sorted names. Raises
    UserError for fewer than two classes.
    """
    found = sorted({plain_number(label) for label in labels})
    check_classes(found, where)
    numbers = all(map(NUMBER.fullmatch, found))
    return [str(place) for place in range(max(map(int, found)) + 1)] if numbers else found


def plain_number(label: str) -> str:
    """Strip leading zeros from a number; return any other label unchanged."""
    return str(int(label)) if NUMBER.fullmatch(label) else label


def check_classes(names: Sequence[str], where: str) -> None:
    """Raise UserError if there are fewer than two classes or if a name occurs twice."""
    if len(names) < 2:
        raise UserError(f"{where} has {shown(names)}: at least two are needed to tell apart")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{where} names the class {twice!r} twice: rename one")


def match_outputs(count: int, names: Sequence[str], *, knower: str, namer: str, fix: str = NAMES_FILE) -> list[int]:
    """Return the output index for each of `names`, for a model with `count` unnamed outputs.

    If `count` is the number of classes of ImageNet-1k (1000) or of one of the larger ImageNet sets, a name may be a
    WordNet id or a word that belongs to one class only. In every case a number is an output index. Raises UserError if
    a name has no match or if two names match the same output.
    """
    table = _imagenet(count)
    places = [table.get(name, table.get(_plain(name), -1)) for name in names]
    if min(places, default=-1) < 0:
        numbers = [int(name) if NUMBER.fullmatch(name) else count for name in names]
        places = numbers if max(numbers) < count else places
    if min(places, default=-1) >= 0 and len(set(places)) == len(places):
        return places
    has = f"ImageNet's {count} classes" if table else f"{count} outputs without names"
    raise UserError(
        f"the classes of {namer} cannot be matched to {knower}: {namer} has {shown(names)}; {knower} has {has}. {fix}"
    )


def read_names(file: str | Path) -> list[str]:
    """Read class names from a text file with one name per line, or from a JSON list or {number: name} object.

    Names may repeat: ImageNet has two classes called crane. Raises FileNotFoundError if the file is missing, and
    UserError for any other content, an empty name or a missing number.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of class names {path}: check the path")
    text = read_text(path)
    try:
        content = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
        if isinstance(content, dict):
            numbered = {int(number): name for number, name in content.items()}
            content = [numbered.get(number) for number in range(len(numbered))]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} does not hold class names ({error}): write one on a line, in UTF-8") from error
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise UserError(
            f"{path} must hold a name for each output: a list, or an object with the numbers from 0 as keys"
        )
    names = [name.strip() for name in content]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise UserError(f"{path} has an empty name: each output needs one")
    return names


def shown(names: Sequence[str], most: int = 8) -> str:
    """Return a shortened list of class names with their count, for messages."""
    listed = ", ".join(f"{name!r:.40}" for name in names[:most])
    return f"{len(names)} class{'es' * (len(names) != 1)} ({listed}{', …' if len(names) > most else ''})"


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).strip()).casefold()


def _number(name: str) -> str | None:
    return plain_number(name) if NUMBER.fullmatch(name) else None


def _places(names: Sequence[str], way: Callable[[str], str | None]) -> dict[str | None, int]:
    """Return the position of each name by its key `way(name)`, leaving out keys that several names share."""
    found: dict[str | None, int] = {}
    for place, name in enumerate(names):
        key = way(name)
        found[key] = -1 if key in found else place
    return {key: place for key, place in found.items() if key is not None and place >= 0}


_SETS = {1000: "imagenet-1k", 11221: "imagenet-21k-miil", 11821: "imagenet-12k", 21841: "imagenet-22k",
         21842: "imagenet-22k-ms", 21843: "imagenet-21k-goog"}  # fmt: skip
"""timm's name for each ImageNet variant by its number of classes, which identifies it."""


@cache
def imagenet_words(count: int) -> list[str]:
    """Return one word per class of the ImageNet variant with `count` classes, or an empty list if there is none."""
    if count not in _SETS:
        return []
    import timm.data

    info = timm.data.ImageNetInfo(_SETS[count])
    return [info.index_to_description(place).split(",")[0] for place in range(info.num_classes())]


@cache
def _imagenet(count: int) -> dict[str, int]:
    """Map WordNet ids and unambiguous words to output indices, for the ImageNet variant with `count` classes."""
    if count not in _SETS:
        return {}
    import timm.data

    info = timm.data.ImageNetInfo(_SETS[count])
    words: dict[str, int] = {}
    for place in range(info.num_classes()):
        for word in {_plain(part) for part in info.index_to_description(place).split(",")}:
            words[word] = -1 if word in words else place
    ids = {name: place for place, name in enumerate(info.label_names())}
    return ids | {word: place for word, place in words.items() if place >= 0}
