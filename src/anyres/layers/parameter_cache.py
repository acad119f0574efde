"""A small bounded cache for tables that are computed from a parameter and the input size."""

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
    """Cache the last `maximum` results per parameter of a function of a parameter and (hashable) sizes.

    It speeds up inference, for example for a bias that is gathered from its table and merged with a mask. Without
    gradients, a result is kept until the parameter is modified in place (optimiser step, `load_state_dict`, weight
    averaging) or moved. With gradients, or while a graph is captured, the function runs every time. Autograd's version
    counter does not notice changes through `.data`: modify the parameter under `torch.no_grad()` instead, or follow
    such a change with a regular one.
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
            # Detached: a view of the parameter would still require gradients, which fused kernels reject.
            return cache.get(call_key(args, kwargs), lambda: function(parameter, *args, **kwargs).detach())

        return wrapper  # type: ignore[return-value]  # mypy gives the first argument a name

    return decorate
