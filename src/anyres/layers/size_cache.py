"""A small bounded cache for tables that depend on the size of the input and on nothing else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def cached_by_size(maximum: int = 64) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Remember the last `maximum` results of a function whose (hashable) arguments are sizes, a dtype and a device.

    Tables made this way are constants of the input's size: they never enter a `state_dict`, and a model that has seen
    one size behaves like one that has not. While a graph is being captured (`torch.compile`, `torch.export`) the
    function runs itself, so that the graph holds the arithmetic and not a stale constant.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        store: OrderedDict[Any, T] = OrderedDict()

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            key = (args, tuple(sorted(kwargs.items())))
            if key in store:
                store.move_to_end(key)
                return store[key]
            # Made outside inference mode: an inference tensor could not be used by a later training step.
            with torch.inference_mode(False), torch.no_grad():
                result = function(*args, **kwargs)
            tensors = [item for item in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(item)]
            if all(type(item) is torch.Tensor for item in tensors):  # a fake tensor of a tracer must not outlive it
                store[key] = result
                if len(store) > maximum:
                    store.popitem(last=False)
            return result

        wrapper.cache = store  # type: ignore[attr-defined]  # tests look at its length
        return wrapper

    return decorate
