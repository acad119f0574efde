from __future__ import annotations

from typing import Any

SMALL = {"*": {"embed_dim": 48, "depth": 3, "num_heads": 3}}


def options(about: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The dense numbers were recorded with the classifier's parameters: its head and its 16x16 kernel."""
    config = about["config"]
    return {"stride": config["patch_size"], "windows": config["window_divisions"]}


OUTPUTS = {"stage1": lambda model, x: model.forward_intermediates(x, [-1], norm=True, intermediates_only=True)[0]}
