"""A small bounded cache for tables computed from a parameter and the size of the input."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from anyres.layers.size_cache import RecentResults, call_key

P = ParamSpec("P")


def cached_for_parameter(
    maximum: int = 8,
) -> Callable[[Callable[Concatenate[Tensor, P], Tensor]], Callable[Concatenate[Tensor, P], Tensor]]:
    """Remember the last `maximum` results per parameter of a function of a parameter and (hashable) sizes.

    For inference: a bias gathered from its table, a mask merged into it. Without gradients the result is kept until
    the parameter changes in place (optimizer step, `load_state_dict`, averaging) or moves; with gradients, and while a
    graph is captured, the function runs each time. A change through `.data` alone is not seen by autograd's version
    counter: follow it with a change that is, or write to the parameter under `torch.no_grad()` instead.
    """

    def decorate(function: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
        caches: Any = WeakIdKeyDictionary()
        lock = Lock()

        @wraps(function)
        def wrapper(parameter: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
            if (
                torch.is_grad_enabled()
                or torch.compiler.is_compiling()
                or parameter.is_inference()
                or type(parameter) is not torch.nn.Parameter
            ):
                return function(parameter, *args, **kwargs)
            state = (parameter._version, parameter.data_ptr(), parameter.dtype, parameter.device)
            with lock:
                known, cache = caches.get(parameter, (None, None))
                if known != state:
                    cache = RecentResults(maximum)
                    caches[parameter] = (state, cache)
            # Detached: a mere view of the parameter would still ask for gradients, which fused kernels refuse.
            return cache.get(call_key(args, kwargs), lambda: function(parameter, *args, **kwargs).detach())

        return wrapper  # type: ignore[return-value]  # mypy gives the first argument a name

    return decorate
