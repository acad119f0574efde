"""A small bounded cache for tables that depend only on the input size."""

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
    """The `maximum` most recently used results, by key; thread-safe.

    Two threads that need the same missing result at the same time both compute it.
    """

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
        # Computed outside inference mode, because a later training step could not use an inference tensor.
        with torch.inference_mode(False), torch.no_grad():
            result = make()
        tensors = [item for item in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(item)]
        if all(type(item) is torch.Tensor for item in tensors):  # never keep a tracer's fake tensors
            with self.lock:
                self.results[key] = result
                if len(self.results) > self.maximum:
                    self.results.popitem(last=False)
        return result


def call_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """Return a single key for the arguments of a call."""
    return args, tuple(sorted(kwargs.items()))


def cached_by_size(maximum: int = 64) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Cache the last `maximum` results of a function whose (hashable) arguments are sizes, a dtype and a device.

    Such tables are constants for a given input size: they never enter a `state_dict`, and earlier inputs do not affect
    a model's behaviour. While a graph is captured (`torch.compile`, `torch.export`), the function itself runs, so that
    the graph contains its arithmetic instead of a constant for one size.
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
