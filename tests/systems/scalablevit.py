from __future__ import annotations

from typing import Any

SMALL = {
    "*": {"embed_dims": (16, 24, 32, 48), "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 3), "mlp_ratios": (2,) * 4}
}


def options(about: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    config = about["config"]
    return {"windows": config["wss"], "channel_ratios": config["c_ratios"], "plain_head": config["plain_head"]}
