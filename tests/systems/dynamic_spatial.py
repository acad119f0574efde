from __future__ import annotations

from tests.systems.dynamicvit import FLOORS, OUTPUTS, options

__all__ = ["FLOORS", "OUTPUTS", "SMALL", "options"]

_PYRAMID = {"depths": (1, 1, 4, 1), "prune_before": (1, 2, 3)}
SMALL = {
    "dynamicvit_convnext*": {**_PYRAMID, "embed_dims": (16, 24, 32, 48)},
    "dynamicvit_swin*": {**_PYRAMID, "embed_dim": 16, "num_heads": (1, 2, 2, 4)},
}
