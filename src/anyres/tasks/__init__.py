"""The tasks and their networks: heads on a backbone."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from anyres.errors import UserError
from anyres.tasks.base import Task

TASKS: dict[str, Task] = {}
"""Every task by name; each package in this folder that defines a task has it as `TASK`."""
for _module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    if _module.ispkg:
        _task: Task = importlib.import_module(f"{__name__}.{_module.name}").TASK
        TASKS[_task.name] = _task


def load_pretrained(name: str | Path, **overrides: Any) -> Any:
    """Load a trained model of any task from a folder (RUN/best, `save_pretrained`) or `hf-hub:OWNER/NAME`.

    Args:
        overrides: constructor arguments to replace; for classifiers only.

    Returns:
        The model in eval mode.

    Raises:
        FileNotFoundError: if the folder does not exist.
        UserError: if the folder is damaged, or its task is unknown.
    """
    from anyres.io import hub

    config, state = hub.read_folder(hub.find_folder(name))
    task = config.get("task", "classification")
    try:
        if task not in TASKS:
            raise UserError(
                f"it is a model for {task!r:.80}, but this version knows only {', '.join(TASKS)}: update anyres."
            )
        return TASKS[task].from_config(config, state, overrides)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def task_of(model: Any) -> Task:
    """Return the task of a model; models from other libraries are image classifiers."""
    return TASKS[getattr(model, "task", "classification" if getattr(model, "num_frames", None) is None else "video")]
