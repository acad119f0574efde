"""Multi-resolution training: `train(load_config("resformer_small", data="/data/imagenet", output="runs/small"))`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from anyres.training.recipe import list_recipes, load_config

if TYPE_CHECKING:
    from anyres.training.loop import train
    from anyres.training.run import RunResult

__all__ = ["RunResult", "list_recipes", "load_config", "train"]


def __getattr__(name: str) -> Any:
    # Import torch, timm and accelerate on first use, so that the command line's help does not wait for them.
    homes = {"train": "loop", "RunResult": "run"}
    if name in homes:
        return getattr(importlib.import_module(f"anyres.training.{homes[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
