"""Multi-resolution training: `train(load_config("resformer_small", data="/data/imagenet", output="runs/small"))`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyres.training.recipe import list_recipes, load_config

if TYPE_CHECKING:
    from anyres.training.loop import RunResult, train

__all__ = ["RunResult", "list_recipes", "load_config", "train"]


def __getattr__(name: str) -> Any:
    # torch, timm and accelerate load with the first use: the command line's help must not wait for them.
    if name in ("RunResult", "train"):
        from anyres.training import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
