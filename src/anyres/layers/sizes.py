"""Arithmetic on sizes that also holds if they are symbols, while a graph is captured for every height and width.

Two rules make it exact wherever such a graph runs. No branch on a size, except through `known`. And sizes are only
added, subtracted, multiplied and divided by `//` with operands that are not negative: ONNX Runtime and OpenVINO round
negative quotients towards zero, and OpenVINO knows no `%`, `min` and `max` of sizes. Tensors of positions have no such
limits, except that ONNX cannot take their remainder by a symbol (see `wrapped`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyres.shapes import Grid


def known(condition: bool) -> bool:
    """Return a condition on sizes; False if it is undecided because they are symbols.

    A shortcut taken on `known` must therefore have a general form that gives the same result.
    """
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def same(grid: Grid, other: Grid) -> bool:
    """Return whether two grids are `known` to be equal."""
    return known(grid[0] == other[0]) and known(grid[1] == other[1])


def undecided(side: int, other: int) -> bool:
    """Return whether sizes are symbols that may or may not be equal."""
    return not known(side == other) and not known(side != other)


def ceil_div(side: int, part: int) -> int:
    return (side + part - 1) // part


def round_up(side: int, multiple: int) -> int:
    """Return the smallest multiple that is at least the side."""
    return ceil_div(side, multiple) * multiple


def missing(side: int, multiple: int) -> int:
    """Return how much the side lacks to a multiple."""
    return round_up(side, multiple) - side


def is_zero(side: int) -> int:
    """Return 1 if the side is 0, else 0."""
    return 1 // (side + 1)


def is_below(side: int, limit: int) -> int:
    """Return 1 if the side is below the limit, which is at least 1, else 0."""
    return is_zero(side // limit)


def at_least_one(side: int) -> int:
    return side + is_zero(side)


def narrow(x: Tensor, axis: int, start: int, length: int) -> Tensor:
    """Return `x.narrow(axis, start, length)`; a gather while a graph is captured, because a range of symbols must be
    proved to lie inside the tensor."""
    if not torch.compiler.is_compiling():
        return x.narrow(axis, start, length)
    return x.index_select(axis, torch.arange(length, device=x.device) + start)


def crop(x: Tensor, axis: int, grid: Grid) -> Tensor:
    """Return the first rows and columns of a map whose rows are that axis, like `narrow`."""
    return narrow(narrow(x, axis, 0, grid[0]), axis + 1, 0, grid[1])


def regroup(x: Tensor, *shape: int) -> Tensor:
    """Reshape; through a single axis while a graph is captured, so that no proof of how symbols merge is needed."""
    if not torch.compiler.is_compiling():
        return x.reshape(shape)
    return x.clone(memory_format=torch.contiguous_format).flatten().view(shape)


def floor_of_product(count: int, factor: float) -> int:
    """Return int(count * factor), rounded as doubles round: 90 * 0.7 gives 62, but 80 * 0.7 gives 56."""
    return torch.sym_int(count * factor)


def larger(side: int, other: int) -> int:
    """Return the larger size. OpenVINO cannot convert a graph in which it depends on symbols."""
    if known(side >= other):
        return side
    return other if known(side <= other) else torch.sym_max(side, other)  # type: ignore[return-value]


def wrapped(position: Tensor, side: int) -> Tensor:
    """Return the remainder by the side of positions below twice the side."""
    return torch.where(position < side, position, position - side)
