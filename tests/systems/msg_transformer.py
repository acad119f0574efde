from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

SMALL = {"*": {"embed_dim": 16, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 2, 4), "mlp_ratio": 2.0}}


def options(about: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    window_size = about["config"]["window_size"]
    if window_size == 7:
        return {}
    return {"name": "msg_transformer_tiny", "window_size": window_size, "img_size": about["config"]["img_size"]}


def messengers(stage: int) -> Callable[[Any, Tensor], Tensor]:
    return lambda model, x: model.forward_intermediates(x, [stage], return_prefix_tokens=True, intermediates_only=True)[
        0
    ][1].permute(0, 3, 1, 2)


OUTPUTS = {f"msg{i + 1}": messengers(i) for i in range(4)}
