"""anyres: vision transformers that work at any input size.

Importing the package registers every model with timm as `anyres_<name>`. The `anyres` command alone starts without
that, because its `--help` must not wait for torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from anyres.backbone import Backbone
    from anyres.checkpoints import LoadReport, load_checkpoint
    from anyres.errors import UserError
    from anyres.registry import create_model, list_models, model_info
    from anyres.tasks import load_pretrained

_HOMES = {
    "Backbone": "backbone",
    "LoadReport": "checkpoints",
    "load_checkpoint": "checkpoints",
    "UserError": "errors",
    "create_model": "registry",
    "list_models": "registry",
    "load_pretrained": "tasks",
    "model_info": "registry",
}

__all__ = [  # noqa: RUF022  # in the order of _HOMES
    "Backbone",
    "LoadReport",
    "load_checkpoint",
    "UserError",
    "create_model",
    "list_models",
    "load_pretrained",
    "model_info",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


if Path(sys.argv[0] if sys.argv else "").stem != "anyres":
    import anyres.registry  # noqa: F401  # registers the models
