from __future__ import annotations

from typing import Any

SMALL = {
    "*": {"embed_dims": (16, 24, 32, 48), "depths": (1, 2, 2, 1), "num_heads": (1, 2, 2, 3), "mlp_ratios": (2,) * 4}
}
FLOORS = True


def options(about: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Published dense files hold the classifier's norm and head besides: the classifier with the dense code's maps."""
    return {
        "stage_norms": about["config"].get("extra_norm", False),
        "mask_padding": about["variant"].endswith("_masked"),
    }
