"""One captured graph serves every batch size, height and width, with eager's results."""

from __future__ import annotations

import pytest
import torch

from anyres.export.capture import capture
from anyres.models._registry import entries
from tests.contract.small import distinct_models, image, small

ONE_OF_EACH = {entries()[name].family.model: name for name in reversed(distinct_models())}


@torch.no_grad()
def close(ours: object, expected: object) -> bool:
    pairs = [(ours, expected)] if torch.is_tensor(ours) else list(zip(ours, expected, strict=True))  # type: ignore[call-overload]
    return all(a.shape == b.shape and (a - b).norm() <= 1e-5 * b.norm() for a, b in pairs)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", ONE_OF_EACH.values())
@torch.no_grad()
def test_exported_graph(name: str, dense: bool) -> None:
    model = small(name, **({"dense": True} if dense else {}))
    program = capture(model, image(2, (160, 288), model)).module()
    for batch, size in ((1, (97, 131)), (3, (224, 224)), (2, (65, 260))):
        x = image(batch, size, model)
        assert close(program(x), model(x)), size
