"""Values from text, YAML or Python, as the type that an option has."""

from __future__ import annotations

import difflib
import math
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from anyres.errors import UserError


def did_you_mean(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(words)}"


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type of its option. Text that means a number is taken as one: YAML reads 1e-5 as text."""
    try:
        return _as_type(value, hint)
    except (TypeError, ValueError, OverflowError):
        if get_origin(hint) is Literal:
            choices = [str(choice) for choice in get_args(hint)]
            raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}") from None
        raise UserError(f"{name} is {value!r}; it must be {_type_words(hint)}") from None


def _as_type(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        for choice in sorted(arguments, key=lambda choice: choice is not types.NoneType):
            try:
                return _as_type(value, choice)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if origin is Literal:
        if value in arguments:
            return value
        # `distillation: none` or `resume: no` in YAML may arrive as None or False.
        words = {None: "none", False: "no", True: "yes"}
        if isinstance(value, bool | None) and words[value] in arguments:
            return words[value]
        raise ValueError
    if origin is list:
        if value is None or value in ("", "none", "[]"):
            return []
        items = value if isinstance(value, list | tuple) else str(value).split(",")
        return [_as_type(item, arguments[0]) for item in items]
    if origin is dict:
        return dict(value)
    if hint is types.NoneType:
        if value is None or value == "none":
            return None
        raise TypeError
    if hint is bool or isinstance(value, bool):
        if hint is bool and isinstance(value, bool):
            return value
        raise TypeError
    if hint is str:
        if isinstance(value, str | Path):
            return str(value)
        raise TypeError
    if hint is int and isinstance(value, float) and value != int(value):
        raise ValueError
    number = hint(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _type_words(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "none"}
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        return " or ".join(_type_words(choice) for choice in arguments)
    if origin is list:
        return f"a list of values, each {_type_words(arguments[0])}"
    return words.get(hint, "`name: value` pairs")
