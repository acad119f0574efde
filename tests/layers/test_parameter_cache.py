from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from anyres.layers.parameter_cache import cached_for_parameter

calls: list[int] = []


@cached_for_parameter(maximum=2)
def scaled(parameter: torch.Tensor, factor: int) -> torch.Tensor:
    calls.append(factor)
    return parameter * factor


def optimizer_step(parameter: torch.nn.Parameter) -> None:
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], 0.1).step()


def load(parameter: torch.nn.Parameter) -> None:
    module = torch.nn.Module()
    module.weight = parameter
    module.load_state_dict({"weight": torch.zeros(3)})


def average(parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        torch._foreach_lerp_([parameter], [torch.zeros(3)], 0.5)


@pytest.mark.parametrize("change", [optimizer_step, load, average])
def test_a_changed_parameter_is_computed_anew(change: Callable[[torch.nn.Parameter], None]) -> None:
    calls.clear()
    parameter = torch.nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        assert torch.equal(scaled(parameter, 2), 2 * parameter)
        scaled(parameter, 2)
    assert calls == [2]
    change(parameter)
    with torch.inference_mode():
        assert torch.equal(scaled(parameter, 2), 2 * parameter)
    assert calls == [2, 2]


def test_gradients_flow_and_nothing_is_kept() -> None:
    calls.clear()
    parameter = torch.nn.Parameter(torch.ones(3))
    scaled(parameter, 3).sum().backward()
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, torch.full((3,), 3.0))
    scaled(parameter, 3)
    assert calls == [3, 3]


def test_bounded_and_gone_with_the_parameter() -> None:
    calls.clear()
    parameter = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        for factor in (1, 2, 3, 1):
            scaled(parameter, factor)
    assert calls == [1, 2, 3, 1]
    address = id(parameter)
    del parameter
    gc.collect()
    other = torch.nn.Parameter(torch.full((3,), 5.0))
    with torch.no_grad():
        assert torch.equal(scaled(other, 2), torch.full((3,), 10.0)), address
