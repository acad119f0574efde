"""Base class of networks that are a head on a backbone: training, evaluation, saving and loading."""

from __future__ import annotations

import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from anyres.errors import UserError
from anyres.io import hub
from anyres.layers.init import init_scaled
from anyres.models._backbone import Backbone
from anyres.models._registry import create_model, entries, resolve_name
from anyres.options import check_kind, is_kind


def is_count(value: Any, least: int = 1) -> bool:
    """Return whether the value of an option is a whole number of at least `least`."""
    return is_kind(value, int) and value >= least


def blocks_of(backbone: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a backbone's stages."""
    for module in backbone.modules():
        blocks = getattr(module, "blocks", None)
        if isinstance(blocks, nn.ModuleList):
            yield from blocks


def leave_inputs_alone(network: nn.Module) -> None:
    """Make every in-place activation, such as those of torchvision, return a new tensor.

    Its input is the output of another module, which a hook may still refer to.
    """
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]


class TaskModel(nn.Module, ABC):
    """A backbone in its dense form with a head.

    The constructor of a subclass is `__init__(self, backbone, num_classes, **options)`. It passes the options on to
    this class, which saves them in `config.json`.
    """

    task: ClassVar[str]

    def __init__(self, backbone: Backbone, num_classes: int, **options: Any) -> None:
        super().__init__()
        if not is_count(num_classes):
            raise UserError(f"num_classes is {num_classes}; a model for {self.task} needs at least 1.")
        self.backbone = backbone
        self.num_classes = num_classes
        self.options = options
        self.pretrained_cfg: dict[str, Any] = dict(backbone.pretrained_cfg)

    @classmethod
    def build(
        cls, backbone: str, num_classes: int, backbone_args: dict[str, Any] | None = None, /, **options: Any
    ) -> Self:
        """Build a model on a registered backbone, given by name, with `options` for the head.

        Raises UserError for an unknown name or option, like `create_model`.
        """
        cls.check_options(options)
        return cls(cls.dense_backbone(backbone, backbone_args or {}, options), num_classes, **options)

    @classmethod
    def check_options(cls, options: dict[str, Any]) -> None:
        """Raise UserError for an option that the constructor does not have, or a value that its annotation excludes."""
        hints = typing.get_type_hints(cls.__init__)
        parameters = inspect.signature(cls.__init__).parameters
        fixed = ("self", "backbone", "num_classes")
        known = [name for name in parameters if name not in fixed]
        for name, value in options.items():
            if name in fixed or (name not in known and "options" not in known):
                raise UserError(f"a model for {cls.task} has no option {name!r:.80}; it has {', '.join(known)}.")
            check_kind(name, value, hints.get(name, Any))

    @classmethod
    def dense_backbone(cls, name: str, args: dict[str, Any], options: dict[str, Any]) -> Backbone:
        """Build the backbone in the form that this task needs; `options` are those of the head."""
        model: Any = create_model(resolve_name(name), **{"dense": True, **args})
        return model

    @abstractmethod
    def forward_train(self, view: Any, targets: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return the inputs of the loss for one training view, by name.

        With "gap" in `targets`, the result includes "gap", the mean of the backbone's last feature map (B, C).
        """

    @property
    def minimum_size(self) -> int:
        """Smallest side of an image in pixels."""
        return self.backbone.minimum_size

    @property
    def in_chans(self) -> int:
        return self.backbone.in_chans

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that are exempt from weight decay as published, besides vectors and biases."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns for layer-wise learning rates: the backbone's layers, then the head."""

        def inside(pattern: str) -> str:
            return pattern.replace("^", r"^backbone\.", 1)

        groups = self.backbone.group_matcher(coarse)
        blocks = groups["blocks"]
        blocks = [(inside(blocks), None)] if isinstance(blocks, str) else [(inside(p), order) for p, order in blocks]
        return {"stem": inside(groups["stem"]), "blocks": [*blocks, (r"^(?!backbone\.)", (99999,))]}

    def init_scaled(self) -> None:
        """Initialise the weights scaled by each layer's fan-in (see `layers.init.init_scaled`)."""
        init_scaled(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def parts_to_shard(self) -> Iterator[nn.Module]:
        """Yield the modules that get their own FSDP group; each must be entered through its `forward`."""
        return blocks_of(self.backbone)

    # On disk --------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The contents of `config.json`, enough to build this network again."""
        known, own = hub.split_pretrained_cfg({**self.pretrained_cfg, "num_classes": self.num_classes})
        return {
            "architecture": f"anyres_{self.task}",
            "task": self.task,
            "num_classes": self.num_classes,
            "options": self.options,
            "backbone": {
                "architecture": str(self.backbone.architecture).removeprefix("anyres_"),
                "model_args": self.backbone.model_args,
            },
            "pretrained_cfg": {key: value for key, value in known.items() if key != "architecture"},
            "anyres": own,
        }

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json`, `model.safetensors` and a model card atomically, and return the folder.

        Raises UserError if the folder contains anything but a model that anyres saved there.
        """
        from anyres.tasks import TASKS

        return hub.write_folder(folder, self.config, self.state_dict(), TASKS[self.task].pipeline)

    @classmethod
    def from_config(cls, config: dict[str, Any], state: dict[str, Tensor]) -> Self:
        """Build a network from the `config.json` and weights of a folder, in eval mode.

        Raises UserError if the two do not fit.
        """
        backbone, options = config.get("backbone", {}), config.get("options", {})
        name, args = backbone.get("architecture"), backbone.get("model_args", {})
        if name is None or "num_classes" not in config:
            raise UserError("config.json lacks the backbone or num_classes: restore the folder.")
        name = resolve_name(name)
        # create_model accepts more arguments, but a file must not trigger downloads.
        entries()[name].family.model.check_args(name, args)
        model = hub.with_weights(lambda: cls.build(name, config["num_classes"], args, **options), state)
        model.pretrained_cfg = {**config.get("pretrained_cfg", {}), **config.get("anyres", {})}
        return model
