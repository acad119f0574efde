"""The names that people give to the parts of a data set."""

from __future__ import annotations

from collections.abc import Iterable

from anyres.errors import UserError

TRAIN_NAMES = ("train", "training")
MEANINGS = {
    "train": (TRAIN_NAMES,),
    "val": (("val", "valid", "validate", "validation", "dev"), ("test", "testing")),
}
"""Names of the same meaning, in any case, in the order in which they are looked for: what is called test serves for
validation where nothing else is there."""
VALIDATION_NAMES = tuple(name for names in MEANINGS["val"] for name in names)


def check_split(split: str) -> None:
    """Refuse a split that is none of train, val and all."""
    if split not in ("train", "val", "all"):
        raise UserError(f"split {split!r} must be 'train', 'val' or 'all'")


def find_split(names: Iterable[str], split: str) -> str | None:
    """The name that means this split ("train" or "val"), in any case; None if there is none.

    Raises UserError for two names of the same meaning, such as val and Valid: one of them would be left out.
    """
    names = sorted(names)
    for meaning in MEANINGS[split]:
        found = [name for name in names if name.casefold() in meaning]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]} are both names of one split: join or rename one of them")
        if found:
            return found[0]
    return None


def looks_like_split(name: str) -> bool:
    """Whether a folder of this name is a part of a data set rather than a class."""
    return name.casefold() in (*TRAIN_NAMES, *VALIDATION_NAMES)


def differ_by_split(names: Iterable[str]) -> bool:
    """Whether two of the names differ only in the part that they say they are, as seg_train and seg_test do."""
    lower = [name.casefold() for name in names]

    def rests(words: Iterable[str]) -> set[str]:
        return {name.replace(word, "") for name in lower for word in words if word in name}

    return bool(rests(TRAIN_NAMES) & rests(VALIDATION_NAMES))
