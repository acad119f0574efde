"""Heads on a backbone: segmentation, detection, video."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import Tensor

from anyres.errors import UserError
from anyres.io import hub
from anyres.models._registry import model_of_folder

_CLASSES = {"segmentation": "Segmenter", "detection": "Detector", "video": "SpaceTime"}


def load_pretrained(name: str | Path, **overrides: Any) -> Any:
    """A trained model of any task from a folder (RUN/best, `save_pretrained`) or `hf-hub:OWNER/NAME`, in eval mode.

    `overrides` replace constructor arguments of a classifier. Errors: FileNotFoundError, UserError for a damaged
    folder.
    """
    config, state = hub.read_folder(hub.find_folder(name))
    try:
        return _from_config(config, state, overrides)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _from_config(config: dict[str, Any], state: dict[str, Tensor], overrides: dict[str, Any]) -> Any:
    task = config.get("task")
    if task is None:
        return model_of_folder(config, state, **overrides)
    if task not in _CLASSES:
        raise UserError(f"it is a model for {task!r:.80}, and this version knows {', '.join(_CLASSES)}: update anyres.")
    if overrides:
        raise UserError(f"it is a model for {task}: load it without {', '.join(overrides)}.")
    # Only the task's own module is imported: the others may need what is not installed.
    return getattr(importlib.import_module(f"anyres.tasks.{task}"), _CLASSES[task]).from_config(config, state)


def task_of(model: Any) -> str:
    """What a model is for: "classification" (also models that are not ours), "segmentation", "detection", "video"."""
    return getattr(model, "task", "classification" if getattr(model, "num_frames", None) is None else "video")
