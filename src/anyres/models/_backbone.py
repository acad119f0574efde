"""The common interface of all models: any input size, a head, feature maps, parameter groups, and a folder on disk.

One file, though long: it covers everything that timm's users expect of a model.
"""

from __future__ import annotations

import difflib
import inspect
import tempfile
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyres.errors import UserError, first_line
from anyres.io import hub
from anyres.layers.init import init_linear, init_scaled
from anyres.models._keys import KeyRule, Layout, Recognised, best, readings, rename
from anyres.options import check_kind

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Variant:
    """A published network of a family: its arguments and the results that its authors report."""

    published: str
    """Name in the published code."""
    args: dict[str, Any]
    """Constructor arguments that differ from the class's defaults."""
    drop_path: float = 0.0
    """Drop-path rate in the published training."""
    top1: dict[int, float] = field(default_factory=dict)
    """Published top-1 in percent by test size."""
    train_sizes: tuple[int, ...] = (224,)
    crop_pct: float = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    notes: str = ""
    benchmark: str = "ImageNet-1k"
    """The data that `top1` is for."""


@dataclass(frozen=True)
class Family:
    """A paper's models: their class, the published networks, and the source."""

    model: type[Backbone]
    variants: dict[str, Variant]
    paper: str
    repository: str
    licence: str
    size_policy: str
    """How the models handle any input size, in a few sentences."""
    classifier: str | tuple[str, ...] = "head"
    first_conv: str = "patch_embed.proj"


class DetectorForm(NamedTuple):
    """How a paper's detectors are built on its backbone."""

    style: str = "standard"
    """Design of the layers around the heads: a name in `tasks.detection.network.STYLES`."""
    levels: Literal["maps", "last", "simple"] = "maps"
    """Input of the neck: every map, only the last one, or ViTDet's simple feature pyramid of the last one."""
    coarse: Literal["map", "pyramid"] = "map"
    """Source of the additional, convolutional levels: the backbone's last map, or that of the feature pyramid."""


class Backbone(nn.Module, ABC):
    """Base class of all models. A subclass sets the attributes below in `__init__` and implements the abstract methods.

    All methods have the same meaning as in timm. Inputs are (B, in_chans, H, W) with H and W at least `minimum_size`.
    """

    num_classes: int
    in_chans: int
    embed_dim: int
    num_features: int
    head_hidden_size: int
    num_prefix_tokens: int
    global_pool: str
    head: nn.Module
    minimum_size: int
    feature_info: list[dict[str, Any]]
    """For each level: `num_chs`, `reduction`, and `module`, the name of a module that returns it as a single tensor."""
    output_fmt: str
    """Layout of the outputs of these modules: "NHWC", "NLC" (all tokens, prefix first) or "NCHW"."""
    grad_checkpointing = False
    num_frames: int | None = None
    """Number of frames per clip of a video model with inputs (B, in_chans, T, H, W); None for image models."""

    detector: ClassVar[DetectorForm] = DetectorForm()
    """How the family's detectors are built."""

    fixed_options: tuple[str, ...] = ()
    """Options of a base class that cannot be set for this class."""
    pools: tuple[str, ...] = ("avg", "")
    """Allowed values of `global_pool`; the first is the published one."""
    published_keys: tuple[KeyRule, ...] = ()
    """Rules from published parameter names to ours, applied in this order; other names are the same."""
    layouts: tuple[Layout, ...] = ()
    """Names that other libraries give to the same parameters."""
    averaged = False
    """Whether the authors' results are those of the averaged weights, where a file has both."""
    published_constants: tuple[str, ...] = ()
    """Last parts of published names whose values the code computes itself (index tables, masks): ignored on loading."""
    unused: tuple[str, ...] = ()
    """Name fragments of parameters that exist in published files but are never used, so they need no gradient."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the arguments passed by name before any constructor runs. Raises UserError."""
        cls.check_args(cls.__name__, kwargs)
        return super().__new__(cls)

    @classmethod
    def detector_args(cls, finest: int) -> dict[str, Any]:
        """Return constructor arguments for the dense form in a detector whose first map has stride `finest`."""
        return {"dense": True}

    @property
    def dense_info(self) -> list[dict[str, Any]]:
        """The entries of `feature_info` for the maps of the dense form."""
        return self.feature_info

    def use_maps(self, levels: Collection[int]) -> None:
        """Remove parameters that only levels other than these use, since no loss would reach them."""

    def make_maps_alike(self) -> None:
        """Remove the last map's norm if the other maps have none."""

    def __init__(self) -> None:
        super().__init__()
        self.architecture: str | None = None
        self.model_args: dict[str, Any] = {}
        self.pretrained_cfg: dict[str, Any] = {}

    @classmethod
    def check_args(cls, name: str, given: dict[str, Any]) -> None:
        """Raise UserError for an unknown constructor argument of the model `name`, or one of the wrong type.

        For an unknown argument, the message suggests the nearest existing one.
        """
        known = cls._arguments()
        for key, value in given.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}."
                raise UserError(f"{name} has no option {key!r:.80}: {hint}")
            check_kind(f"{key} of {name}", value, known[key])

    @classmethod
    def from_args(cls, name: str, args: dict[str, Any], given: dict[str, Any]) -> Self:
        """Build the model `name`; `given` are those of `args` that are not the published ones.

        Raises UserError if they do not give a valid network; the published arguments always do.
        """
        try:
            return cls(**args)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if not given or isinstance(error, UserError):
                raise
            pairs = ", ".join(f"{key}={value!r:.80}" for key, value in given.items())
            raise UserError(f"{name} cannot be built with {pairs} ({first_line(error)}): change them.") from error

    @classmethod
    def _arguments(cls) -> dict[str, Any]:
        """Return the annotations of the constructor's keyword arguments, including those of base classes."""
        found: dict[str, Any] = {}
        for kind in cls.__mro__:
            if constructor := vars(kind).get("__init__"):
                hints = typing.get_type_hints(constructor, include_extras=True)
                parameters = inspect.signature(constructor).parameters.values()
                for parameter in parameters:
                    if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                        found.setdefault(parameter.name, hints.get(parameter.name, Any))
                if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
                    break
        return {name: hint for name, hint in found.items() if name not in ("self", *cls.fixed_options)}

    # Forward --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Return features after the final norm, tokens (B, N, C) or a map (B, H, W, C)."""

    @abstractmethod
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, num_classes) from the output of `forward_features`.

        With `pre_logits`, return the pooled features (B, C) instead.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    @abstractmethod
    def forward_train(self, x: Tensor, targets: Sequence[str] = ("cls",)) -> dict[str, Tensor]:
        """Return what a training loss may need from a single forward pass.

        This is "logits", "cls" (the input vector of the head), and on request "gap" (the mean patch token after the
        final norm, (B, C)). Distilled models add "dist_logits".
        """

    @abstractmethod
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return feature maps (B, C_i, h_i, w_i) of the levels `indices` (last n if an int, all if None).

        Unless `intermediates_only`, the final features come first. `norm` applies the final norm to the maps. Arguments
        and order are as in timm.
        """

    @abstractmethod
    def feature_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return (h_i, w_i) of every level of `feature_info` for an input of this size, without running the model."""

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Return the last `n` levels (or those listed), as maps if `reshape`, else as tokens (DINO's interface)."""
        return self.forward_intermediates(
            x,
            indices=n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def check_size(self, x: Tensor) -> None:
        """Raise UserError unless images are (B, in_chans, H, W) and not smaller than `minimum_size`."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise UserError(
                f"The input has shape {tuple(x.shape)}, but this model takes (batch, {self.in_chans}, height, width): "
                "add the missing axis or build the model with other in_chans."
            )
        height, width = x.shape[-2:]
        if height < self.minimum_size or width < self.minimum_size:
            nearest = max(height, self.minimum_size), max(width, self.minimum_size)
            raise UserError(
                f"The image is {height}x{width}, but both sides must be at least {self.minimum_size}: "
                f"the nearest size that works is {nearest[0]}x{nearest[1]}."
            )

    def check_clip(self, x: Tensor) -> None:
        """Raise UserError unless clips are (B, in_chans, T, H, W) with T at least 1."""
        if x.ndim != 5 or x.shape[1] != self.in_chans or x.shape[2] == 0:
            raise UserError(
                f"The input has shape {tuple(x.shape)}, but this model takes clips (batch, {self.in_chans}, frames, "
                "height, width): add the missing axis or build the model with other in_chans."
            )

    def run(self, module: Callable[..., Tensor], *args: Any) -> Tensor:
        """Call a block, recomputing it in the backward pass if gradient checkpointing is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False)
        return module(*args)

    # Head and training hooks ----------------------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes` classes; with 0 the model returns pooled features."""
        if global_pool is not None:
            if global_pool not in self.pools:
                known = ", ".join(repr(name) for name in self.pools)
                raise UserError(f"global_pool={global_pool!r} is not known here: choose one of {known}.")
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = self.new_head(num_classes)

    def new_head(self, num_classes: int) -> nn.Module:
        """Return a new classifier, or an identity for 0 classes."""
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.head_hidden_size, num_classes)
        init_linear(head)
        return head.to(next(self.parameters()).device)

    def init_scaled(self) -> None:
        """Reinitialise weights by each layer's number of inputs (see `layers.init.init_scaled`)."""
        init_scaled(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that published training excludes from weight decay, in addition to vectors and biases."""

    @abstractmethod
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by layer, as in timm (layer-wise learning rates, freezing)."""

    @abstractmethod
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the levels `indices` do not need; returns their indices in the shortened model."""

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, **_: Any) -> None:
        """Check the size, for code written for fixed-size models; nothing needs to be set, as every size works."""
        if img_size is not None:
            height, width = pair(img_size)
            if min(height, width) < self.minimum_size:
                raise UserError(
                    f"img_size={img_size} is below the minimum: both sides must be at least {self.minimum_size}."
                )

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's older name for `pretrained_cfg`."""
        return self.pretrained_cfg

    @default_cfg.setter
    def default_cfg(self, value: dict[str, Any]) -> None:
        self.pretrained_cfg = value

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights under our names, published ones, or those of another library in `layouts`.

        timm loads a `checkpoint_path` in this way.
        """
        own = self.state_dict()
        if state_dict.keys() != own.keys() and all(map(torch.is_tensor, state_dict.values())):
            state_dict = best(self.readings(dict(state_dict)), own).state
        return super().load_state_dict(state_dict, strict, assign)

    # Published checkpoints ------------------------------------------------------------------------------------------

    @classmethod
    def readings(cls, state: dict[str, Tensor], part: bool = False) -> list[Recognised]:
        """Return a state dict under our names, in every way in which its names can be read (see `_keys.readings`)."""
        return readings(state, cls.from_published, cls.layouts, part)

    @classmethod
    def from_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict from published names to ours; names that are already ours are unchanged."""
        return dict(
            rename(name, tensor, cls.published_keys)
            for name, tensor in state.items()
            if name.rpartition(".")[2] not in cls.published_constants
        )

    @classmethod
    def to_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Undo `from_published`."""
        return dict(rename(name, tensor, cls.published_keys, back=True) for name, tensor in state.items())

    def fold_norms(self) -> Self:
        """Fuse every batch norm directly after a convolution into it, in place, for inference.

        The fused norms disappear from the state dict, so save or load weights first.
        """
        for module in self.modules():
            if callable(fold := getattr(module, "fold", None)):
                fold()
        return self

    def fit_tables(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return resized versions of the tables in `state` that have another native size, and nothing else."""
        return {}

    @classmethod
    def default_out_indices(cls, args: dict[str, Any]) -> tuple[int, ...]:
        """Return the default levels of `features_only`, given the constructor's arguments."""
        return (0, 1, 2, 3)

    # On disk --------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """Return the content of `config.json`, from which the network can be rebuilt.

        It has timm's layout; entries unknown to timm are under "anyres".
        """
        if self.architecture is None:
            raise UserError(
                "This model was built from its class, so its configuration is not known: build it with create_model."
            )
        known, own = hub.split_pretrained_cfg({**self.pretrained_cfg, "num_classes": self.num_classes})
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "num_features": self.num_features,
            "global_pool": self.global_pool,
            "model_args": {**self.model_args, "num_classes": self.num_classes, "global_pool": self.global_pool},
            "pretrained_cfg": {key: value for key, value in known.items() if key != "architecture"},
            "anyres": own,
        }

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json`, `model.safetensors` and a model card, atomically.

        timm can read the result as `local-dir:FOLDER`. Raises UserError if the folder contains anything but a model
        written by anyres.
        """
        return hub.write_folder(folder, self.config, self.state_dict(), "image-classification")

    def push_to_hub(self, repository: str, private: bool = False) -> str:
        """Upload to the Hugging Face Hub as OWNER/NAME; returns the URL."""
        with tempfile.TemporaryDirectory() as folder:
            return hub.upload_folder(self.save_pretrained(Path(folder) / "model"), repository, private)

    @classmethod
    def from_pretrained(cls, name: str | Path, **overrides: Any) -> Self:
        """Load a model of this class from a folder or `hf-hub:OWNER/NAME`, in eval mode.

        `anyres.load_pretrained` also finds the class.
        """
        config, state = hub.read_folder(hub.find_folder(name))
        return cls.from_config(config, state, **overrides)

    @classmethod
    def from_config(cls, config: dict[str, Any], state: dict[str, Tensor], **overrides: Any) -> Self:
        """Build the model of a folder's `config.json` with its weights, in eval mode. Raises UserError if they do not
        match."""
        name, args = config["architecture"], {**config.get("model_args", {}), **overrides}
        plain = name.removeprefix("anyres_")
        cls.check_args(plain, args)
        model = hub.with_weights(lambda: cls.from_args(plain, args, args), state)
        model.architecture, model.model_args = name, args
        model.pretrained_cfg = {**config.get("pretrained_cfg", {}), **config.get("anyres", {})}
        return model


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return a side or (height, width) as (height, width)."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def take_indices(levels: int, indices: int | Sequence[int] | None, output_fmt: str = "NCHW") -> tuple[list[int], int]:
    """Return the chosen levels (last n if an int, all if None) as non-negative indices, and the deepest of them."""
    if output_fmt not in ("NCHW", "NLC"):
        raise UserError(f"output_fmt={output_fmt!r} is not known: choose 'NCHW' or 'NLC'.")
    return feature_take_indices(levels, list(indices) if isinstance(indices, Sequence) else indices)
