from __future__ import annotations

from typing import Any

SMALL = {"*": {"embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4)}}
FLOORS = True


def options(about: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    if about["variant"].endswith("_split8"):
        return {"name": "cswin_tiny", "split_sizes": about["config"]["split_size"][:3]}
    return {"dense": True} if about["variant"].endswith("_dense") else {}
