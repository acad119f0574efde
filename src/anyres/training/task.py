"""What is particular to a kind of run: its data, network, loss and score. The loop is the same for all of them."""

from __future__ import annotations

import importlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import nn

from anyres.data.loading import Views
from anyres.data.schedule import Size
from anyres.io.files import existing
from anyres.io.hub import CONFIG, WEIGHTS, check_config
from anyres.models._checkpoints import LoadReport, load_checkpoint
from anyres.training.config import RunConfig
from anyres.training.losses import BaseLoss

logger = logging.getLogger(__name__)

OTHER_CLASSES = "%s was trained on other classes, or on these in another order: the head starts afresh"


class Task(ABC):
    """A kind of run, with the options of one run."""

    score: ClassVar[str]
    """Column of metrics.csv by which the best weights are chosen, in percent: the mean over the training sizes."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def open_source(self, split: str, like: Any = None) -> Any:
        """The data of "train" or "val"; with `like`, an open source, numbered and coloured as that one."""

    @abstractmethod
    def build_model(self, source: Any) -> Any:
        """The network for the source's classes and channels."""

    @abstractmethod
    def views(self, source: Any) -> Views:
        """How the source's items become training views."""

    @abstractmethod
    def build_loss(self, source: Any, accelerator: Accelerator) -> BaseLoss:
        """(outputs of `forward_train`, target, view) → scalar."""

    @abstractmethod
    def evaluate(self, model: Any, source: Any, size: Size, device: torch.device, precision: str) -> dict[str, float]:
        """Scores on the whole source by column name; `score` first."""

    def validation_data(self) -> tuple[str, bool]:
        """Where the validation data are, and whether they are for nothing else: then all of them are read where they
        have no splits. Those of the training data are not, whichever option names them."""
        data, given = self.config.data, self.config.val_data
        return given or data, given is not None and os.path.realpath(given) != os.path.realpath(data)

    def mix(self, views: list[Any], targets: list[Any], epoch: int, step: int) -> tuple[list[Any], list[Any]]:
        """Views and targets on the device as the loss takes them."""
        return views, targets

    def set_training_mode(self, model: nn.Module) -> None:
        """Before every epoch."""
        model.train()

    def facts(self, source: Any) -> dict[str, Any]:
        """What a user of the weights has to know about the data, for `pretrained_cfg`."""
        return {}

    def load(self, model: Any, path: Path) -> LoadReport:
        """Take over the weights of `init_from`; what does not fit stays, and a head for other classes, too."""
        return load_but_head(model, path, model.get_classifier())


_PLACES = {"classification": "Classification", "segmentation": "Segmentation", "detection": "Detection",
           "video": "Video"}  # fmt: skip


def open_task(config: RunConfig) -> Task:
    """The task that the options are for. Only its own module is imported: the others may need what is not installed."""
    module = importlib.import_module(f"anyres.training.{config.task}")
    task: Task = getattr(module, _PLACES[config.task])(config)
    return task


def weights_file(path: str) -> Path:
    """The best weights of a run folder; the path itself if it is none."""
    inside = [existing(Path(path) / "best") / WEIGHTS, Path(path) / WEIGHTS]
    return next((candidate for candidate in inside if candidate.is_file()), Path(path))


def load_but_head(model: Any, path: Path, head: nn.Module) -> LoadReport:
    """Load a weights file into a model, but for the `head` where the file is of a model for other classes: a head of
    the same size would fit, and mean something else."""
    fresh = deepcopy(head.state_dict())
    report = load_checkpoint(model, path, strict=False)
    if for_other_classes(path, model.pretrained_cfg.get("label_names")):
        head.load_state_dict(fresh)
        logger.warning(OTHER_CLASSES, path)
    return report


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
