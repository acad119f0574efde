from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

SMALL = {"*": {"embed_dim": 24, "depth": 6, "group_tokens": (6, 4)}}


def options(about: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    form = about["variant"].rpartition("_")[2]
    return {form: True} if form in ("dense", "adapter") else {}


def stage1(model: Any, x: Tensor) -> Tensor:
    """The normed map, or the first of the dense form's."""
    if model.dense:
        return model(x)[0]
    return model.forward_intermediates(x, [-1], norm=True, intermediates_only=True)[0]


def stage(index: int) -> Callable[[Any, Tensor], Tensor]:
    return lambda model, x: model(x)[index]


def layer(index: int) -> Callable[[Any, Tensor], Tensor]:
    return lambda model, x: model.forward_intermediates(x, [index], output_fmt="NLC", intermediates_only=True)[0]


OUTPUTS = {
    "stage1": stage1,
    **{f"stage{i + 1}": stage(i) for i in (1, 2, 3)},
    **{f"layer{i}": layer(i) for i in (0, 1, 11)},
}
