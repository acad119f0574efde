"""Initial weights from a run, a saved model or a file."""

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

OTHER_CLASSES = "%s was trained on other classes, or on the same in another order: the head is not loaded"


def weights_file(path: str) -> Path:
    """Return the weights file in a run's or saved model's folder, the best one of a run; otherwise the path itself."""
    inside = [existing(Path(path) / "best") / WEIGHTS, Path(path) / WEIGHTS]
    return next((candidate for candidate in inside if candidate.is_file()), Path(path))


def load_but_head(model: Any, path: Path, head: nn.Module, ema: bool | None = None) -> LoadReport:
    """Load a weights file into a model, without the `head` if the file is for other classes.

    A head with the same number of classes would fit, but its outputs would mean something else.
    """
    fresh = deepcopy(head.state_dict())
    report = load_checkpoint(model, path, strict=False, ema=ema)
    if not is_for_classes_of(model, path):
        head.load_state_dict(fresh)
    return report


def is_for_classes_of(model: Any, path: Path) -> bool:
    """Return whether a weights file is for the model's classes, as far as is known; log a warning if it is not."""
    other = for_other_classes(path, model.pretrained_cfg.get("label_names"))
    if other:
        logger.warning(OTHER_CLASSES, path)
    return not other


def for_other_classes(path: Path, label_names: Sequence[str] | None) -> bool:
    """Return whether the folder of a weights file belongs to a model for other classes, or the same in another order.

    False if the file is not in the folder of a saved model, because then its classes are unknown.
    """
    file = path.parent / CONFIG
    if path.name != WEIGHTS or not file.is_file():
        return False
    config = check_config(file)
    names = {**config.get("pretrained_cfg", {}), **config.get("anyres", {})}.get("label_names")
    return names is not None and list(names) != list(label_names or ())


def holds_task(path: Path, task: str) -> bool:
    """Return whether a weights file is in the folder of a saved model for this task."""
    file = path.parent / CONFIG
    return path.name == WEIGHTS and file.is_file() and check_config(file).get("task") == task
