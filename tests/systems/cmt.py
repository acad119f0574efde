from __future__ import annotations

from typing import Any

SMALL = {
    "*": {
        "embed_dims": (8, 16, 24, 32),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 2, 4),
        "stem_dim": 8,
        "head_dim": 40,
        "mlp_ratio": 2.0,
    }
}


def options(about: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    return {"img_size": about["config"]["img_size"]}
