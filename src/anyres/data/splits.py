"""The accepted names of dataset splits."""

from __future__ import annotations

from collections.abc import Iterable

from anyres.errors import UserError

TRAIN_NAMES = ("train", "training")
MEANINGS = {
    "train": (TRAIN_NAMES,),
    "val": (("val", "valid", "validate", "validation", "dev"), ("test", "testing")),
}
"""Equivalent split names, case-insensitive, in order of preference: "test" is used for validation if nothing else
exists."""
VALIDATION_NAMES = tuple(name for names in MEANINGS["val"] for name in names)


def check_split(split: str) -> None:
    """Raise UserError unless the split is train, val or all."""
    if split not in ("train", "val", "all"):
        raise UserError(f"split {split!r} must be 'train', 'val' or 'all'")


def find_split(names: Iterable[str], split: str) -> str | None:
    """Return the name that means this split ("train" or "val"), ignoring case, or None.

    Raises UserError for two equivalent names, such as val and Valid: one of them would be left out.
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
    """Return whether a folder with this name looks like a split of a dataset rather than a class."""
    return name.casefold() in (*TRAIN_NAMES, *VALIDATION_NAMES)


def differ_by_split(names: Iterable[str]) -> bool:
    """Return whether two names differ only in the split that they mention, like seg_train and seg_test."""
    lower = [name.casefold() for name in names]

    def rests(words: Iterable[str]) -> set[str]:
        return {name.replace(word, "") for name in lower for word in words if word in name}

    return bool(rests(TRAIN_NAMES) & rests(VALIDATION_NAMES))
