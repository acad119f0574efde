"""What functions promise less of than a test knows."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def as_a(kind: type[T], value: object) -> T:
    """The same object, checked to be of this class: `create_model` promises a module, `open_source` one of two kinds of
    source, and a part of a module is a tensor or a module."""
    assert isinstance(value, kind), f"{type(value).__name__} is no {kind.__name__}"
    return value
