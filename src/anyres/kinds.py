"""Kinds of constructor arguments: the bounds of an argument stand beside it, in its annotation (`options.is_kind`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

from pydantic import Field

T = TypeVar("T")

Count = Annotated[int, Field(ge=1, le=65_536, description="a whole number from 1 to 65536")]
"""A width, a side, a stride: something of which there must be at least one."""
Depth = Annotated[int, Field(ge=1, le=1_024, description="a whole number from 1 to 1024")]
"""A number of layers."""
WholeNumber = Annotated[int, Field(ge=0, le=1_048_576, description="a whole number from 0 to 1048576")]
"""A number of something that may be left out."""
Rate = Annotated[float, Field(ge=0, lt=1, description="a number from 0 to below 1")]
"""A share that is dropped."""
Factor = Annotated[float, Field(gt=0, le=1_024, description="a number above 0 and at most 1024")]
"""How many times as wide."""
Pair = Annotated[Sequence[T], Field(min_length=2, max_length=2, description="two values")]
Size = Count | Pair[Count]
"""A side or (height, width)."""
Three = Annotated[Sequence[T], Field(min_length=3, max_length=3, description="three values")]
PerStage = Annotated[Sequence[T], Field(min_length=4, max_length=4, description="four values, one for each stage")]
