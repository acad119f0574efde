"""Base class of tasks whose network is a head on a dense backbone."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyres.errors import UserError
from anyres.tasks.base import Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from anyres.models._checkpoints import LoadReport
    from anyres.tasks.network import TaskModel


class DenseTask(Task):
    """A task whose network is a head on a backbone."""

    keeps_ratio = True

    @property
    @abstractmethod
    def network(self) -> type[TaskModel]:
        """The class of the network."""

    def build(self, options: Any, source: Any) -> TaskModel:
        import torch
        import torch.distributed as dist
        from torch import nn

        backbone = {"in_chans": source.in_chans, "drop_path_rate": options.drop_path, **self.backbone_args(options)}
        head = {"head": options.head, **self.head_args(source), **options.head_args}
        classes = len(source.label_names)
        model = self.network.build(options.model, classes, {**backbone, **options.model_args}, **head)
        if options.batch_norm != "sync" or not (dist.is_initialized() and dist.get_world_size() > 1):
            return model  # with a single process, "sync" is the same as "train"
        if not torch.cuda.is_available():
            raise UserError("batch_norm sync over several processes needs GPUs; choose train or frozen")
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def backbone_args(self, options: Any) -> dict[str, Any]:
        """Return arguments of the backbone that follow from the options."""
        return {}

    def head_args(self, source: Any) -> dict[str, Any]:
        """Return arguments of the head that follow from the data."""
        return {}

    def from_config(self, config: dict[str, Any], state: dict[str, Tensor], overrides: dict[str, Any]) -> TaskModel:
        if overrides:
            raise UserError(f"it is a model for {self.name}: load it without {', '.join(overrides)}.")
        return self.network.from_config(config, state)

    def load(self, model: TaskModel, path: Path, ema: bool | None = None) -> LoadReport:
        """Load the whole model from weights for the same task and classes, otherwise only the backbone.

        Only the backbone is loaded from weights for another task, other classes, or from a published file.
        """
        from anyres.models._checkpoints import load_checkpoint
        from anyres.tasks.weights import holds_task, is_for_classes_of

        whole = holds_task(path, self.name) and is_for_classes_of(model, path)
        return load_checkpoint(model if whole else model.backbone, path, strict=False, ema=ema)

    def set_training_mode(self, options: Any, model: nn.Module) -> None:
        from torch import nn

        from anyres.tasks.network import TaskModel

        model.train()
        if options.batch_norm == "frozen":
            # `model` may be wrapped. The head is newly initialised, so it has no statistics to freeze.
            network = next(module for module in model.modules() if isinstance(module, TaskModel))
            for module in network.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def facts(self, options: Any, source: Any) -> dict[str, Any]:
        return {"longest": options.longest, "interpolation": "bilinear"}
