"""Weights to start from: those of a run, of a saved model, of a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn

from anyres.io.files import existing
from anyres.io.hub import CONFIG, WEIGHTS, check_config
from anyres.models._checkpoints import LoadReport, load_checkpoint

logger = logging.getLogger(__name__)

OTHER_CLASSES = "%s was trained on other classes, or on these in another order: the head starts afresh"


def weights_file(path: str) -> Path:
    """The best weights of a run folder; the path itself if it is none."""
    inside = [existing(Path(path) / "best") / WEIGHTS, Path(path) / WEIGHTS]
    return next((candidate for candidate in inside if candidate.is_file()), Path(path))


def load_but_head(model: Any, path: Path, head: nn.Module) -> LoadReport:
    """Load a weights file into a model, but for the `head` where the file is of a model for other classes: a head of
    the same size would fit, and mean something else."""
    fresh = deepcopy(head.state_dict())
    report = load_checkpoint(model, path, strict=False)
    if not is_for_classes_of(model, path):
        head.load_state_dict(fresh)
    return report


def is_for_classes_of(model: Any, path: Path) -> bool:
    """Whether a weights file is for the model's classes, as far as it says; a warning where it is not."""
    other = for_other_classes(path, model.pretrained_cfg.get("label_names"))
    if other:
        logger.warning(OTHER_CLASSES, path)
    return not other


def for_other_classes(path: Path, label_names: Sequence[str] | None) -> bool:
    """Whether the saved model's folder that a weights file lies in names other classes, or the same in another order.
    A lone file says nothing."""
    file = path.parent / CONFIG
    if path.name != WEIGHTS or not file.is_file():
        return False
    config = check_config(file)
    names = {**config.get("pretrained_cfg", {}), **config.get("anyres", {})}.get("label_names")
    return names is not None and list(names) != list(label_names or ())


def holds_task(path: Path, task: str) -> bool:
    """Whether a weights file lies in a saved model's folder for this task."""
    file = path.parent / CONFIG
    return path.name == WEIGHTS and file.is_file() and check_config(file).get("task") == task
