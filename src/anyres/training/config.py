# ruff: noqa: RUF009  (`option` makes a dataclass field; nothing mutable is shared)
"""Everything a training run can be told, one flat dataclass for each task, and the reading of recipe files into it.

The help text of an option stands beside it; `field_help()` gives them all to the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import yaml

from anyres.errors import UserError

RECIPES = Path(__file__).parent / "recipes"


def option(default: Any, text: str) -> Any:
    """A field of a configuration with its help text; lists and dictionaries are copied for every instance."""
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass
class RunConfig:
    """Options that every training run has; those of `Classify` and the other tasks are below."""

    task: ClassVar[str]

    # What is trained, on what, into which folder
    model: str = option("resformer_tiny", "Architecture, a name from `anyres models`.")
    model_args: dict[str, Any] = option({}, "Further arguments of create_model, such as {embed_dim: 96, depth: 4}.")
    data: str = option("digits", "Training data: digits, a folder, hf:NAME, hf-stream:NAME or wds:PATTERN.")
    val_data: str | None = option(None, "Validation data, if it is not the other split of `data`.")
    output: str = option("runs/train", "Run folder: weights, metrics, logs and the state to resume from.")
    init_from: str | None = option(
        None, "Start from the weights of this run or checkpoint file; not the same as resume."
    )
    epoch_size: int | None = option(None, "Images per epoch: needed for streams of unknown length, a cut for others.")
    max_bad_fraction: float = option(0.01, "Share of unreadable images in an epoch at which the run stops.")

    # Sizes
    sizes: list[int | str] = option([128, 160, 224], "Training sizes in pixels, each a side or HEIGHTxWIDTH.")
    mode: Literal["replicate", "sample"] = option(
        "replicate", "Every image at all sizes per step, or a size per batch."
    )
    per: Literal["iteration", "epoch"] = option(
        "iteration", "How often mode=sample draws a size, the same on all processes."
    )
    window: int | None = option(None, "mode=replicate with only this many neighbouring sizes per step, sliding.")
    separate_aug: bool = option(True, "Augment every replica on its own; otherwise small ones are resized large ones.")
    distillation: Literal["none", "smooth-l1", "l2", "cosine", "kl"] = option(
        "smooth-l1", "Scale consistency: how a replica is compared with the next larger one."
    )
    distillation_target: Literal["cls", "gap", "logit"] = option(
        "cls", "Scale consistency: what is compared (vector that enters the head, mean patch token, logits)."
    )
    distillation_alpha: float = option(1.0, "Weight of scale consistency.")

    # Optimisation
    epochs: int = option(300, "Passes over the training images.")
    batch_size: int = option(128, "Images per optimiser step, over all processes and accumulated passes together.")
    accumulation: int = option(1, "Passes that a step is split into, to save memory; their gradients add up.")
    optimizer: str = option("adamw", "Optimiser, a name of timm.optim.")
    lr: float | None = option(None, "Peak learning rate; otherwise base_lr x batch_size / 512.")
    base_lr: float = option(5e-4, "Peak learning rate of a batch_size of 512.")
    weight_decay: float = option(0.05, "Weight decay; not for biases, norms and the model's no_weight_decay().")
    decay_all: bool = option(False, "Weight decay for every parameter (PVT's and P2T's dense settings).")
    layer_decay: float | None = option(None, "Learning rate factor from one layer to the one below it.")
    schedule: Literal["iteration", "epoch"] = option(
        "iteration", "Learning rate: changed at every step (ResFormer), or once per epoch as DeiT does."
    )
    decay: Literal["cosine", "linear", "poly", "step"] = option(
        "cosine", "How the learning rate falls; poly has the power 0.9, step is 0.1 at each of `drops`."
    )
    drops: list[float] = option([], "decay=step: epochs after which the learning rate is a tenth.")
    warmup_epochs: float = option(5.0, "Epochs of linear warm-up.")
    warmup_lr: float = option(0.0, "Learning rate at the start of the warm-up (not scaled).")
    min_lr: float = option(1e-5, "Learning rate at the end (not scaled).")
    clip_grad: float | None = option(None, "Largest norm of the gradient.")
    ema_decay: float = option(0.0, "Decay of an exponential moving average of the weights; 0 keeps none.")
    ema_warmup: bool = option(False, "Let the average's decay grow from 0, for runs of a few thousand steps.")
    drop_path: float = option(0.1, "Stochastic depth of the last block.")

    # Augmentation
    hflip: float = option(0.5, "Probability of a horizontal flip.")
    interpolation: str = option("bicubic", "Interpolation of resizes, in training and validation.")
    repeats: int = option(1, "Repeated augmentation: copies of an image per epoch (an epoch keeps its length).")

    # Validation
    eval_every: int = option(1, "Epochs between validations at all training sizes; the last one always validates.")
    eval_batch_size: int = option(128, "Images per process and pass in validation.")

    # Machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps.")
    precision: Literal["auto", "float32", "bf16", "fp16"] = option(
        "auto", "auto is bf16 on GPUs and CPUs that do it in hardware (AMX, AVX512-BF16), float32 elsewhere."
    )
    compile: bool = option(False, "torch.compile, one graph per size.")
    grad_checkpointing: bool = option(False, "Compute activations again in the backward pass to save memory.")
    fsdp: bool = option(False, "Shard weights and optimiser over the processes (FSDP2) instead of copying them (DDP).")
    workers: int | None = option(None, "Data loading processes per process; otherwise from the number of CPUs.")
    seed: int = option(0, "Seed of everything random.")
    deterministic: bool = option(False, "Only deterministic kernels (slower on GPUs).")

    # Records, saving and stopping
    log_every: int = option(50, "Optimiser steps between log entries.")
    wandb: bool = option(False, "Log to Weights & Biases too (TensorBoard always).")
    trackio: bool = option(False, "Log to trackio too.")
    progress: bool = option(True, "Progress bar on a terminal, a line per epoch elsewhere; or silence.")
    save_every_minutes: float = option(10.0, "Save to resume from this often, besides every epoch's end; 0: never.")
    save_every_steps: int | None = option(None, "Also save it after this many optimiser steps.")
    keep: int = option(2, "States to keep; the older ones serve if a disk spoils the newest.")
    resume: Literal["auto", "yes", "no"] = option(
        "auto", "Continue the run in `output`: if there is one, or fail, or start over and replace it."
    )
    time_limit: float | None = option(None, "Minutes after which the run saves and stops; resume continues it.")
    early_stop: int | None = option(None, "Stop after this many epochs without a better validation.")
    fraction: float = option(1.0, "Dry run on this part of every epoch and of the validation images.")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            setattr(self, field.name, _convert(field.name, getattr(self, field.name), hints[field.name]))
        self.check()

    def check(self) -> None:
        """Refuse values that cannot work, before anything is loaded."""
        for words, (rule, names) in _RULES.items():
            for name in names.split():
                value = getattr(self, name, None)
                if value is not None and not rule(value):
                    raise UserError(f"{name} is {value}; it must be {words}")
        count = len(self.shapes)
        if self.window is not None and self.window > count:
            raise UserError(f"window is {self.window}; it must not exceed the number of sizes, {count}")
        if self.batch_size % self.accumulation:
            raise UserError(f"batch_size {self.batch_size} must be a multiple of accumulation, {self.accumulation}")
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"warmup_epochs is {self.warmup_epochs:g}; it must be less than epochs, {self.epochs}")
        if self.distillation == "kl" and self.distillation_target != "logit":
            raise UserError("distillation kl compares probabilities; set distillation_target logit")
        if self.schedule == "epoch" and self.decay != "cosine":
            raise UserError(f"schedule epoch is DeiT's cosine; choose schedule iteration for decay {self.decay}")
        if (self.decay == "step") != bool(self.drops):
            raise UserError(
                f"decay is {self.decay} and drops are {self.drops}; step needs drops, and nothing else does"
            )
        if self.fsdp and self.ema_decay:
            raise UserError("fsdp keeps no moving average of the weights; set ema_decay 0 or fsdp false")

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Training sizes as (height, width), large to small."""
        from anyres.data.schedule import parse_sizes

        shapes = dict.fromkeys(parse_sizes(",".join(map(str, self.sizes))))
        return sorted(shapes, key=lambda shape: -shape[0] * shape[1])

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else self.base_lr * self.batch_size / 512

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.yaml."""
        return {"task": self.task, **dataclasses.asdict(self)}

    @property
    def unused_parameters(self) -> bool:
        """Whether a step may leave parameters without a gradient, which DDP has to be told."""
        return False


@dataclass
class LabelConfig(RunConfig):
    """Options of runs whose images or clips carry one label: crops, mixing, smoothing."""

    separate_mix: bool = option(False, "Draw mixup/CutMix for every replica on its own.")
    crop_scale: list[float] = option([0.08, 1.0], "Random crop: range of its share of the image's area.")
    crop_ratio: list[float] = option([3 / 4, 4 / 3], "Random crop: range of width / height.")
    auto_augment: str | None = option("rand-m9-mstd0.5-inc1", "timm's RandAugment/AutoAugment policy.")
    color_jitter: float = option(0.3, "Colour jitter; inactive together with auto_augment.")
    erasing: float = option(0.25, "Probability of random erasing.")
    mixup: float = option(0.8, "Mixup alpha; 0 switches it off.")
    cutmix: float = option(1.0, "CutMix alpha; 0 switches it off.")
    mix_prob: float = option(1.0, "Probability that a batch is mixed.")
    switch_prob: float = option(0.5, "Probability of CutMix where both are on.")
    smoothing: float = option(0.1, "Label smoothing.")


@dataclass
class TrainConfig(LabelConfig):
    """Options of a classifier's run; defaults are ResFormer's published ones where it has one."""

    task: ClassVar[str] = "classification"

    crop_pct: float | None = option(None, "Validation: centre crop / resized short side; otherwise 0.875 (digits: 1).")

    # Distillation from a teacher network
    teacher: str | None = option(None, "Teacher network: a timm name (regnety_160), or a run's weights folder.")
    teacher_weights: str | None = option(None, "Checkpoint of a timm teacher; otherwise timm's pretrained weights.")
    teacher_kind: Literal["hard", "soft"] = option("hard", "Learn the teacher's arg-max label, or its probabilities.")
    teacher_alpha: float = option(0.5, "Weight of the teacher's term; the labels' has 1 minus this.")
    teacher_tau: float = option(1.0, "Temperature of teacher_kind=soft (its term is divided by batch times classes).")

    # Sparsification (DynamicViT)
    sparsify: float = option(
        0.0, "Weight of the keep-ratio loss; the unpruned model, from teacher_weights or init_from, teaches. 0: off."
    )

    @property
    def unused_parameters(self) -> bool:
        # Without a teacher a distilled model's second head gets no gradient.
        return self.teacher is None and "distilled" in self.model

    def check(self) -> None:
        super().check()
        if self.sparsify and self.teacher:
            raise UserError("sparsify has its own teacher, the unpruned model; leave teacher out")


CONFIGS: dict[str, type[RunConfig]] = {config.task: config for config in (TrainConfig,)}
"""Options by task."""


def field_help(task: str = "classification") -> dict[str, str]:
    """Help text by option name."""
    return {field.name: field.metadata["help"] for field in dataclasses.fields(CONFIGS[task])}


def list_recipes(task: str = "classification") -> list[str]:
    """Names of the recipes for a task that come with the package."""
    return sorted(path.stem for path in (RECIPES / task).glob("*.yaml"))


def read_recipe(name: str | Path, task: str = "classification") -> dict[str, Any]:
    """Options of a recipe, by its name or by the path of a YAML file (such as a run's config.yaml).

    Raises:
        UserError: no such recipe, a file that is not a YAML mapping, an unknown option, or a recipe of another task.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / task / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"recipe {str(name)!r} does not exist{did_you_mean(str(name), list_recipes(task))}")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"recipe file {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = getattr(error, "problem_mark", None)
        raise UserError(f"{path} is not valid YAML{f' (line {place.line + 1})' if place else ''}") from None
    if not isinstance(options, dict):
        raise UserError(f"{path} must hold options as `name: value` lines")
    found = options.pop("task", task)
    if found != task:
        raise UserError(f"{path} is a recipe for {found}, not for {task}; choose the command of its task")
    check_names(options, task, where=str(path))
    return options


def load_config(
    recipe: str | Path | Mapping[str, Any] | None = None, task: str = "classification", **overrides: Any
) -> Any:
    """The options of a recipe (name, path or mapping), changed by `overrides`: those of `CONFIGS[task]`."""
    options = dict(recipe) if isinstance(recipe, Mapping) else read_recipe(recipe, task) if recipe is not None else {}
    options.update(overrides)
    check_names(options, task)
    return CONFIGS[task](**options)


def check_names(options: Mapping[str, Any], task: str = "classification", where: str = "") -> None:
    """Raise `UserError` for the first option that does not exist, with the nearest that does."""
    known = field_help(task)
    for name in options:
        if name not in known:
            prefix = f"{where}: " if where else ""
            raise UserError(f"{prefix}option {name!r} does not exist{did_you_mean(str(name), list(known))}")


def did_you_mean(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(words)}"


_RULES: dict[str, tuple[typing.Callable[[Any], bool], str]] = {
    "at least 1": (
        lambda value: value >= 1,
        "epochs batch_size accumulation repeats eval_every eval_batch_size window keep log_every save_every_steps "
        "early_stop epoch_size",
    ),
    "at least 0": (
        lambda value: value >= 0,
        "workers seed weight_decay warmup_epochs warmup_lr min_lr mixup cutmix save_every_minutes color_jitter "
        "distillation_alpha sparsify",
    ),
    "between 0 and 1": (
        lambda value: 0 <= value <= 1,
        "hflip erasing mix_prob switch_prob teacher_alpha max_bad_fraction",
    ),
    "at least 0 and below 1": (lambda value: 0 <= value < 1, "drop_path smoothing ema_decay"),
    "above 0": (lambda value: value > 0, "lr base_lr layer_decay clip_grad teacher_tau time_limit"),
    "above 0 and at most 1": (lambda value: 0 < value <= 1, "fraction crop_pct"),
    "two rising numbers above 0": (lambda value: len(value) == 2 and 0 < value[0] <= value[1], "crop_scale crop_ratio"),
}


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type of its option. Text that means a number is taken as one: YAML reads 1e-5 as text."""
    try:
        return _as_type(value, hint)
    except (TypeError, ValueError, OverflowError):
        if get_origin(hint) is Literal:
            choices = [str(choice) for choice in get_args(hint)]
            raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}") from None
        raise UserError(f"{name} is {value!r}; it must be {_type_words(hint)}") from None


def _as_type(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        for choice in sorted(arguments, key=lambda choice: choice is not types.NoneType):
            try:
                return _as_type(value, choice)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if origin is Literal:
        if value in arguments:
            return value
        # `distillation: none` or `resume: no` in YAML may arrive as None or False.
        words = {None: "none", False: "no", True: "yes"}
        if isinstance(value, bool | None) and words[value] in arguments:
            return words[value]
        raise ValueError
    if origin is list:
        items = value if isinstance(value, list | tuple) else str(value).split(",")
        return [_as_type(item, arguments[0]) for item in items]
    if origin is dict:
        return dict(value)
    if hint is types.NoneType:
        if value is None or value == "none":
            return None
        raise TypeError
    if hint is bool or isinstance(value, bool):
        if hint is bool and isinstance(value, bool):
            return value
        raise TypeError
    if hint is str:
        if isinstance(value, str | Path):
            return str(value)
        raise TypeError
    if hint is int and isinstance(value, float) and value != int(value):
        raise ValueError
    number = hint(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _type_words(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "none"}
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        return " or ".join(_type_words(choice) for choice in arguments)
    if origin is list:
        return f"a list of values, each {_type_words(arguments[0])}"
    return words.get(hint, "`name: value` pairs")
