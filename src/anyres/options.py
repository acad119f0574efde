"""Options: typed values with help texts and bounds, read from text, YAML or Python.

Anything that consists of several components, such as a training run, declares its options as a subclass of `Options`
and builds each component from the options whose names match its parameters. pydantic validates the values; this module
defines how text is parsed, and turns each mistake into a single error message.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator
from pydantic.fields import FieldInfo

from anyres.errors import UserError

T = TypeVar("T")
LARGEST = 1 << 24
LONGEST = 1024
"""Bounds on the numbers and list lengths that `is_kind` accepts; nothing in a network is larger."""
LARGEST_OPTION = (1 << 31) - 1
"""Bound on the whole numbers among options, so that sums and products of them stay within 64 bits."""


def option(default: Any, text: str, **bounds: Any) -> Any:
    """Declare an option with a default, a help text and bounds (`ge`, `gt`, `le`, `lt` as in pydantic's `Field`)."""
    return Field(default, description=text, **bounds)


def _rising(values: list[float]) -> list[float]:
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise UserError(f"{values}; it must be two numbers above 0 in ascending order")
    return values


Range = Annotated[list[float], AfterValidator(_rising)]
"""Two numbers above 0 in ascending order."""
Sides = list[Annotated[int | str, Field(union_mode="left_to_right")]]
"""Sizes: sides, or HEIGHTxWIDTH."""

# Types of constructor arguments whose bounds are part of the annotation.
Count = Annotated[int, Field(ge=1, le=65_536, description="a whole number from 1 to 65536")]
"""A number of at least 1, such as a width, side or stride."""
Depth = Annotated[int, Field(ge=1, le=1_024, description="a whole number from 1 to 1024")]
"""A number of layers."""
WholeNumber = Annotated[int, Field(ge=0, le=1_048_576, description="a whole number from 0 to 1048576")]
"""A number that may be 0."""
Rate = Annotated[float, Field(ge=0, lt=1, description="a number from 0 to below 1")]
"""A dropout or drop path rate."""
Factor = Annotated[float, Field(gt=0, le=1_024, description="a number above 0 and at most 1024")]
"""A width multiplier, such as the MLP ratio."""
_Pair = Annotated[Sequence[T], Field(min_length=2, max_length=2, description="two values")]
SideOrPair = Count | _Pair[Count]
"""A side or (height, width)."""
Three = Annotated[Sequence[T], Field(min_length=3, max_length=3, description="three values")]
PerStage = Annotated[Sequence[T], Field(min_length=4, max_length=4, description="four values, one for each stage")]


class Options(BaseModel):
    """Base class of all options. The constructor raises UserError for the first invalid value."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), validate_default=False
    )
    renamed: ClassVar[Mapping[str, str]] = {}
    """Old name → new name. The error message for an old name gives the new one."""
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """Option name → {old value → new value}, likewise."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(_sentence(type(self), error)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: Any) -> Any:
        new = cls.renamed_values.get(info.field_name, {}).get(str(value))
        if new is not None:
            raise UserError(f"{value!r}, which is now spelled {new!r}")
        return read(value, cls.model_fields[info.field_name].annotation)

    @field_validator("*", mode="after")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int) and abs(number) > LARGEST_OPTION:
                raise UserError(f"{number!s:.80}; it must be at most {LARGEST_OPTION}")
        return value

    @classmethod
    def check_name(cls, name: str) -> None:
        """Raise UserError if there is no such option; the message suggests its new or the closest name."""
        if name in cls.renamed:
            raise UserError(f"option {name!r} is now called {cls.renamed[name]!r}")
        if name not in cls.model_fields:
            raise UserError(f"option {name!r:.80} does not exist{did_you_mean(name, cls.model_fields)}")

    @classmethod
    def translated(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values written by an earlier version, with their current names and spelling."""
        found = {}
        for old, value in values.items():
            name = cls.renamed.get(old, old)
            found[name] = cls.renamed_values.get(name, {}).get(str(value), value)
        return found

    def build(self, component: Callable[..., T], **others: Any) -> T:
        """Call `component` with the options whose names match its parameters, and with `others`."""
        names = inspect.signature(component).parameters.keys() & type(self).model_fields - others.keys()
        return component(**{name: getattr(self, name) for name in names}, **others)

    def changed(self, **values: Any) -> Self:
        """Return a copy with some values changed, validated again."""
        return type(self)(**{**dict(self), **values})


def read(value: Any, hint: Any) -> Any:
    """Convert text, or a value read by YAML, for an option of the type `hint`.

    "none" becomes None, text with commas becomes a list, and False, as which YAML reads `no`, becomes the word "no" for
    a Literal. Numbers in text are left to pydantic, because YAML reads 1e-5 as text.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return read(value, arguments[0])
    if origin in (Union, UnionType):
        if value in (None, "none") and NoneType in arguments:
            return None
        kinds = [kind for kind in arguments if kind is not NoneType]
        return read(value, kinds[0]) if len(kinds) == 1 else value
    if origin is Literal:
        words = {None: "none", False: "no", True: "yes"}
        return words[value] if isinstance(value, bool | None) and words[value] in arguments else value
    if origin in (list, tuple):
        if value is None or value in ("", "none", "[]"):
            return []
        return list(value) if isinstance(value, list | tuple) else str(value).split(",")
    if isinstance(value, bool) and hint is not bool:
        raise ValueError("a bool where another type is expected")
    return str(value) if isinstance(value, Path) else value


def is_kind(value: Any, hint: Any) -> bool:
    """Return whether a value has the type `hint`, without conversion, and is within `LARGEST` and `LONGEST`.

    Supported are bool, int, float, str, None, Literal, and tuples, sequences and unions of them, with or without their
    own bounds. Other hints accept every value.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [bound for field in arguments[1:] for bound in field.metadata]
        return is_kind(value, arguments[0]) and all(_within(value, bound) for bound in bounds)
    if origin in (Union, UnionType):
        return any(is_kind(value, choice) for choice in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(arguments) and all(map(is_kind, value, arguments))
    if origin in (list, Sequence):
        few = isinstance(value, list | tuple) and len(value) <= LONGEST
        return few and all(is_kind(item, arguments[0]) for item in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint not in (int, float, str, NoneType)
    if hint in (int, float):
        is_number = isinstance(value, Integral if hint is int else Real)
        return is_number and -LARGEST <= value <= LARGEST
    if hint is str:
        return isinstance(value, str) and len(value) <= LONGEST
    return value is None or hint is not NoneType


def _within(value: Any, bound: Any) -> bool:
    """Return whether a value is within a bound, such as `Ge` or `MaxLen`."""
    match bound:
        case Ge():
            return bool(value >= bound.ge)
        case Gt():
            return bool(value > bound.gt)
        case Le():
            return bool(value <= bound.le)
        case Lt():
            return bool(value < bound.lt)
        case MinLen():
            return len(value) >= bound.min_length
        case MaxLen():
            return len(value) <= bound.max_length
    raise TypeError(f"{bound!r} is not a bound")


def check_kind(name: str, value: Any, hint: Any) -> None:
    """Raise UserError unless the value is accepted by `is_kind`."""
    if not is_kind(value, hint):
        bound = f" of at most {LARGEST}" if isinstance(value, int) and value > LARGEST else ""
        raise UserError(f"{name} is {value!r:.80}; it must be {type_words(hint)}{bound}.")


def without(options: type[Options], names: Collection[str]) -> type[Options]:
    """Return a class with the options of another one, except for `names`."""
    fields: Any = {name: (field.annotation, field) for name, field in options.model_fields.items() if name not in names}
    made: type[Options] = create_model(options.__name__, __base__=Options, **fields)
    made.renamed, made.renamed_values = options.renamed, options.renamed_values
    return made


def did_you_mean(word: str, words: Collection[str]) -> str:
    """Return the end of an error message about an unknown word: the closest known word, or all of them."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(words)}"


def _sentence(options: type[Options], error: ValidationError) -> str:
    problem = error.errors()[0]
    if not problem["loc"]:  # a rule about several options, which has its own message
        return str(problem["ctx"]["error"])
    name = str(problem["loc"][0])
    try:
        options.check_name(name)
    except UserError as unknown:
        return str(unknown)
    field = options.model_fields[name]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return f"{name} is {cause}"
    value = problem["input"]
    bounds = problem["type"] in ("greater_than_equal", "greater_than", "less_than_equal", "less_than")
    shown = f"{value:g}" if isinstance(value, float) else f"{value!s:.80}" if bounds else f"{value!r:.80}"
    verb = "is" if len(problem["loc"]) == 1 else "holds"
    return f"{name} {verb} {shown}; it must be {bounds_words(field) if bounds else type_words(field.annotation)}"


def bounds_words(field: FieldInfo) -> str:
    """Describe the bounds of an option in words."""
    found = {
        name: value
        for rule in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if (value := getattr(rule, name, None)) is not None
    }
    if "ge" in found and "le" in found:
        return f"between {found['ge']:g} and {found['le']:g}"
    words = {"ge": "at least", "gt": "above", "lt": "below", "le": "at most"}
    return " and ".join(f"{text} {found[name]:g}" for name, text in words.items() if name in found)


def type_words(hint: Any) -> str:
    """Describe a type in words."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "none"}
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        described = next((field.description for field in arguments[1:] if field.description), None)
        each = "".join(f", each {type_words(item)}" for item in get_args(arguments[0]))
        return f"{described}{each}" if described else type_words(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(type_words(choice) for choice in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (list, tuple, Sequence):
        return f"a list of values, each {type_words(arguments[0])}"
    return words.get(hint, "`name: value` pairs")
