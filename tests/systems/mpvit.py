from __future__ import annotations

from typing import Any

SMALL = {"*": {"embed_dims": (16, 24, 32, 48), "depths": (1, 2, 1, 1), "mlp_ratio": 2}}


def options(about: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    return {"dense": True} if about["variant"].endswith("_dense") else {}
