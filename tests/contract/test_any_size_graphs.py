"""One captured graph serves every batch size, height and width, with eager's results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from anyres.export.capture import capture
from anyres.models._registry import entries
from tests.contract.small import distinct_models, image, small

ONE_OF_EACH = {entries()[name].family.model: name for name in reversed(distinct_models())}
OPEN = {"P2T": "not seen to end: its pooled sizes are long expressions of the image's, and capturing takes minutes"}


def one_of_each() -> Iterator[Any]:
    for model, name in ONE_OF_EACH.items():
        reason = OPEN.get(model.__name__)
        yield pytest.param(name, marks=pytest.mark.xfail(run=False, reason=reason)) if reason else name


def tensors(result: Any) -> list[Tensor]:
    return [result] if torch.is_tensor(result) else list(result)


@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", one_of_each())
@torch.no_grad()
def test_exported_graph(name: str, dense: bool) -> None:
    model = small(name, **({"dense": True} if dense else {}))
    program = capture(model, image(2, (160, 288), model)).module(check_guards=False)
    for batch, size in ((1, (97, 131)), (3, (224, 224)), (2, (65, 260))):
        x = image(batch, size, model)
        for ours, expected in zip(tensors(program(x)), tensors(model(x)), strict=True):
            assert ours.shape == expected.shape
            assert (ours - expected).norm() <= 1e-5 * expected.norm(), size
