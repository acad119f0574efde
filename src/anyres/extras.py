"""Optional packages, which only some tasks need."""

from __future__ import annotations

import importlib
from types import ModuleType

from anyres.errors import UserError

_PACKAGES = {
    "av": ("av", "video", "video files"),
    "datasets": ("datasets", "datasets", "Hugging Face datasets"),
    "faster_coco_eval": ("faster-coco-eval", "detection", "masks and COCO's average precision"),
    "pyarrow": ("pyarrow", "parquet", "Parquet files"),
    "trackio": ("trackio", "tracking", "runs with trackio"),
    "wandb": ("wandb", "tracking", "runs with wandb"),
}
"""Module → (package, extra of anyres that installs it, what needs it)."""


def require(module: str) -> ModuleType:
    """Import a module or submodule of an optional package. Call this before starting the work that needs it.

    Raises:
        UserError: if it cannot be imported; the message includes the command that installs it.
    """
    package, extra, purpose = _PACKAGES[module.partition(".")[0]]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose} need the package {package}, which cannot be imported ({error}): pip install 'anyres[{extra}]'"
        ) from error
