"""anyres: vision transformers that work at any input size.

Importing the package registers every model with timm as `anyres_<name>`, at once if timm is already imported and
otherwise when it is. Everything else is imported on first use, so that neither `import anyres` nor `anyres --help`
waits for torch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

if TYPE_CHECKING:
    from anyres.errors import UserError
    from anyres.inference.predictor import Predictor
    from anyres.models._backbone import Backbone
    from anyres.models._checkpoints import LoadReport, load_checkpoint
    from anyres.models._registry import create_model, list_models, model_info
    from anyres.tasks import load_pretrained

_HOMES = {
    "Backbone": "models._backbone",
    "LoadReport": "models._checkpoints",
    "Predictor": "inference.predictor",
    "load_checkpoint": "models._checkpoints",
    "UserError": "errors",
    "create_model": "models._registry",
    "list_models": "models._registry",
    "load_pretrained": "tasks",
    "model_info": "models._registry",
}

__all__ = [  # noqa: RUF022  # in the order of _HOMES
    "Backbone",
    "LoadReport",
    "Predictor",
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
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def _register_models(imported: ModuleType) -> None:
    """Import the registry, which registers the models, once timm is imported.

    Wait while any other anyres module is only partially imported, for example one that is itself importing timm: the
    registry would import that unfinished module.
    """
    ours = (module for name, module in sys.modules.copy().items() if name.startswith(f"{__name__}."))
    half = any(getattr(module.__spec__, "_initializing", False) for module in ours if module is not imported)
    if "timm" in sys.modules and not half:
        importlib.import_module("anyres.models._registry")


wrapt.register_post_import_hook(_register_models, "timm")
for _path in Path(__file__).parent.rglob("*.py"):
    _parts = _path.relative_to(Path(__file__).parent).with_suffix("").parts
    wrapt.register_post_import_hook(_register_models, ".".join((__name__, *_parts)))
