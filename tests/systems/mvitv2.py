from __future__ import annotations

from typing import Any

_TINY = {"embed_dim": 16, "depths": (1, 1, 2, 1), "window_size": 16}
SMALL = {
    "*x?": {**_TINY, "num_frames": 3, "drop_rate": 0.0},
    "*_large*": {**_TINY, "num_heads": 2},
    "*_huge*": {**_TINY, "num_heads": 1},
    "*": _TINY,
}


def options(about: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    if about["variant"].startswith("mvitv2_mini"):
        config = about["config"]["MVIT"]
        return {
            "name": "mvitv2_tiny",
            "embed_dim": config["EMBED_DIM"],
            "num_heads": config["NUM_HEADS"],
            "depths": (2, 2, 2, 2),
            "widen_in_mlp": not config["DIM_MUL_IN_ATT"],
            "class_token": config["CLS_EMBED_ON"],
        }
    return {"dense": True} if about["variant"].endswith("_dense") else {}


OUTPUTS = {
    "cls": lambda model, x: model.forward_intermediates(x, [3], return_prefix_tokens=True, intermediates_only=True)[0][
        1
    ]
}
