"""What training a head on a dense backbone has in common, whatever the head predicts."""

from __future__ import annotations

import logging
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from anyres.errors import UserError
from anyres.models._checkpoints import LoadReport, load_checkpoint
from anyres.tasks.base import TaskModel
from anyres.training.config import DenseConfig
from anyres.training.task import OTHER_CLASSES, Task, for_other_classes, holds_task

logger = logging.getLogger(__name__)


class DenseTask(Task):
    """A head of `network` on a backbone."""

    config: DenseConfig
    network: ClassVar[type[TaskModel]]

    def build_model(self, source: Any) -> TaskModel:
        config = self.config
        own = {"in_chans": source.in_chans, "drop_path_rate": config.drop_path, **self.backbone_args()}
        head = {"head": config.head, **self.head_args(source), **config.head_args}
        model = self.network.build(config.model, len(source.label_names), {**own, **config.model_args}, **head)
        if config.batch_norm != "sync" or not (dist.is_initialized() and dist.get_world_size() > 1):
            return model  # a process alone has all the images: the same as "train"
        if not torch.cuda.is_available():
            raise UserError("batch_norm sync over several processes needs GPUs; choose train or frozen")
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def backbone_args(self) -> dict[str, Any]:
        """Arguments of the backbone that follow from the options."""
        return {}

    def head_args(self, source: Any) -> dict[str, Any]:
        """Arguments of the head that follow from the data."""
        return {}

    @abstractmethod
    def open_source(self, split: str, like: Any = None) -> Any: ...

    def set_training_mode(self, model: nn.Module) -> None:
        model.train()
        if self.config.batch_norm == "frozen":
            # `model` may be wrapped. The head starts afresh: it has no statistics yet that could be kept.
            network = next(module for module in model.modules() if isinstance(module, TaskModel))
            for module in network.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def facts(self, source: Any) -> dict[str, Any]:
        return {"longest": self.config.longest, "interpolation": "bilinear"}

    def load(self, model: TaskModel, path: Path) -> LoadReport:
        """Weights of the same task and classes fill the whole model; others, and those of a classifier or a published
        file, the backbone."""
        whole = holds_task(path, model.task)
        if whole and for_other_classes(path, model.pretrained_cfg.get("label_names")):
            whole = False
            logger.warning(OTHER_CLASSES, path)
        return load_checkpoint(model if whole else model.backbone, path, strict=False)
