"""Tasks, and the networks for them: heads on a backbone."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from anyres.errors import UserError
from anyres.tasks.base import Task

TASKS: dict[str, Task] = {}
"""Every task by its name: each package in here that is one brings a `TASK`."""
for _module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    if _module.ispkg:
        _task: Task = importlib.import_module(f"{__name__}.{_module.name}").TASK
        TASKS[_task.name] = _task


def load_pretrained(name: str | Path, **overrides: Any) -> Any:
    """A trained model of any task from a folder (RUN/best, `save_pretrained`) or `hf-hub:OWNER/NAME`, in eval mode.

    `overrides` replace constructor arguments of a classifier. Errors: FileNotFoundError, UserError for a damaged
    folder.
    """
    from anyres.io import hub

    config, state = hub.read_folder(hub.find_folder(name))
    task = config.get("task", "classification")
    try:
        if task not in TASKS:
            raise UserError(
                f"it is a model for {task!r:.80}, and this version knows {', '.join(TASKS)}: update anyres."
            )
        return TASKS[task].from_config(config, state, overrides)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def task_of(model: Any) -> Task:
    """What a model is for; models that are not ours classify images."""
    return TASKS[getattr(model, "task", "classification" if getattr(model, "num_frames", None) is None else "video")]
