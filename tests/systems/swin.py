from __future__ import annotations

from typing import Any

_TINY = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "mlp_ratio": 2.0}
SMALL = {"*": _TINY}


def options(about: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    if about["variant"] == "swin_tiny_window7_resized_tables":
        return {"name": "swin_tiny", "window_size": record["input"][2] // 32}
    return {"dense": True} if about["variant"].endswith("_dense") else {}
