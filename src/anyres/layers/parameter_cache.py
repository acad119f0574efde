"""A small bounded cache for tables computed from a parameter and the size of the input."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

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
        stores: Any = WeakIdKeyDictionary()

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
            known, store = stores.get(parameter, (None, None))
            if known != state:
                store = OrderedDict()
                stores[parameter] = (state, store)
            key = (args, tuple(sorted(kwargs.items())))
            if key in store:
                store.move_to_end(key)
                return store[key]
            with torch.inference_mode(False), torch.no_grad():
                # Detached: a mere view of the parameter would still ask for gradients, which fused kernels refuse.
                result = function(parameter, *args, **kwargs).detach()
            store[key] = result
            if len(store) > maximum:
                store.popitem(last=False)
            return result

        return wrapper  # type: ignore[return-value]  # mypy gives the first argument a name

    return decorate
