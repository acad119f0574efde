from __future__ import annotations

from typing import Any

SMALL = {"*": {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "head_dim": 8, "mlp_ratios": (2, 2, 2, 2)}}


def options(about: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Other windows for other sizes; the published pooling drops rows and columns at 280."""
    return {"grid_sizes": tuple(about["config"]["grid_sizes"]), "remainder": "truncate"}
