"""A small bounded cache for tables that depend on the size of the input and on nothing else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from threading import Lock
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class RecentResults(Generic[T]):
    """The `maximum` results used last, by key; threads may share it. Two that want the same one at once both make
    it."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.results: OrderedDict[Hashable, T] = OrderedDict()
        self.lock = Lock()

    def __len__(self) -> int:
        return len(self.results)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        with self.lock:
            if key in self.results:
                self.results.move_to_end(key)
                return self.results[key]
        # Made outside inference mode: an inference tensor could not be used by a later training step.
        with torch.inference_mode(False), torch.no_grad():
            result = make()
        tensors = [item for item in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(item)]
        if all(type(item) is torch.Tensor for item in tensors):  # a fake tensor of a tracer must not outlive it
            with self.lock:
                self.results[key] = result
                if len(self.results) > self.maximum:
                    self.results.popitem(last=False)
        return result


def call_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """One key for the arguments of a call."""
    return args, tuple(sorted(kwargs.items()))


def cached_by_size(maximum: int = 64) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Remember the last `maximum` results of a function whose (hashable) arguments are sizes, a dtype and a device.

    Tables made this way are constants of the input's size: they never enter a `state_dict`, and a model that has seen
    one size behaves like one that has not. While a graph is being captured (`torch.compile`, `torch.export`) the
    function runs itself, so that the graph holds the arithmetic and not a stale constant.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        cache: RecentResults[T] = RecentResults(maximum)

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            return cache.get(call_key(args, kwargs), lambda: function(*args, **kwargs))

        wrapper.cache = cache  # type: ignore[attr-defined]  # tests look at its length
        return wrapper

    return decorate
