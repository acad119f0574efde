"""The names that people give to the parts of a data set."""

from __future__ import annotations

from collections.abc import Iterable

from anyres.errors import UserError

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validate", "validation", "dev", "test", "testing")
"""In the order in which they are looked for: what is called test serves where nothing else is there."""


def check_split(split: str) -> None:
    """Refuse a split that is none of train, val and all."""
    if split not in ("train", "val", "all"):
        raise UserError(f"split {split!r} must be 'train', 'val' or 'all'")


def find_split(names: Iterable[str], split: str) -> str | None:
    """The name that means this split ("train" or "val"), in any case; None if there is none."""
    present: dict[str, str] = {}
    for name in sorted(names):
        present.setdefault(name.casefold(), name)
    wanted = TRAIN_NAMES if split == "train" else VALIDATION_NAMES
    return next((present[name] for name in wanted if name in present), None)


def looks_like_split(name: str) -> bool:
    """Whether a folder of this name is a part of a data set rather than a class."""
    return name.casefold() in (*TRAIN_NAMES, *VALIDATION_NAMES)
