"""The options of a training run: one flat set that combines the general options with those of the task."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import create_model

from anyres.errors import UserError
from anyres.options import option
from anyres.tasks import TASKS
from anyres.tasks.options import TaskOptions

CONFIG_FILE = "config.yaml"
"""File in the run folder that records the options."""


class RunConfig(TaskOptions):
    """The options that all tasks share; `config_of` adds those of a task."""

    task: ClassVar[str]
    renamed: ClassVar[Mapping[str, str]] = {"window": "sizes_per_step"}
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {"precision": {"bf16": "bfloat16", "fp16": "float16"}}

    # Model, data and run folder
    output: str = option("runs/train", "Run folder for weights, metrics, logs and the training state.")
    init: Literal["published", "scaled"] = option(
        "published", "Initial weights: as in the paper, or scaled by each layer's fan-in, which narrow networks need."
    )
    epoch_size: int | None = option(
        None, "Images per epoch. Required for streams of unknown length; shortens the epoch of other datasets.", ge=1
    )
    max_bad_fraction: float = option(
        0.01, "Stop the run when this fraction of an epoch's images cannot be read.", ge=0, le=1
    )

    # Sizes
    mode: Literal["replicate", "sample", "auto"] = option(
        "replicate",
        "replicate: every image at all sizes in each step, as published. sample: one size per batch, for the best "
        "accuracy in a given training time. auto: replicate from 300 epochs on, otherwise sample.",
    )
    per: Literal["iteration", "epoch"] = option(
        "iteration", "How often mode=sample draws a new size (the same on all processes)."
    )
    sizes_per_step: int | None = option(
        None,
        "Sizes per step: neighbours, cycling through all (replicate), or drawn at random (sample; default 1).",
        ge=1,
    )
    curriculum: bool = option(
        False, "With mode=sample, draw small sizes more often at the start of training and large ones at the end."
    )
    distillation: Literal["none", "smooth-l1", "l2", "cosine", "kl"] = option(
        "smooth-l1", "Scale consistency: the loss between each replica and the next larger one."
    )
    distillation_target: Literal["cls", "gap", "logit"] = option(
        "cls", "Scale consistency: compare the vector that enters the head, the mean patch token, or the logits."
    )
    distillation_alpha: float = option(1.0, "Scale consistency: weight of the loss.", ge=0)
    distillation_start: float = option(
        0.0, "Scale consistency: fraction of the epochs after which the loss is added.", ge=0, le=1
    )

    # Optimisation
    epochs: int = option(300, "Passes over the training images.", ge=1)
    batch_size: int = option(
        128, "Images per optimiser step, summed over all processes and gradient accumulation steps.", ge=1
    )
    accumulation: int = option(1, "Gradient accumulation steps per optimiser step; more of them save memory.", ge=1)
    optimizer: str = option("adamw", "Name of an optimiser in timm.optim.")
    lr: float | None = option(None, "Peak learning rate; the default is base_lr x batch_size / 512.", gt=0)
    base_lr: float = option(5e-4, "Peak learning rate at a batch_size of 512.", gt=0)
    weight_decay: float = option(
        0.05, "Weight decay; biases, norms and the model's no_weight_decay() are exempt.", ge=0
    )
    decay_all: bool = option(
        False, "Apply weight decay to every parameter without exception (PVT's and P2T's settings for dense tasks)."
    )
    schedule: Literal["iteration", "epoch"] = option(
        "iteration", "Update the learning rate at every step (ResFormer) or once per epoch (DeiT)."
    )
    decay: Literal["cosine", "linear", "poly", "step"] = option(
        "cosine", "Shape of the learning-rate decay. poly has power 0.9; step multiplies by 0.1 at each of `drops`."
    )
    drops: list[float] = option([], "With decay=step, the epochs after which the learning rate is divided by 10.")
    warmup_epochs: float = option(5.0, "Epochs of linear warm-up.", ge=0)
    warmup_lr: float = option(0.0, "Learning rate at the start of warm-up (not scaled with the batch size).", ge=0)
    min_lr: float = option(1e-5, "Final learning rate (not scaled with the batch size).", ge=0)
    clip_grad: float | None = option(None, "Clip the gradient to this norm.", gt=0)
    ema_decay: float = option(
        0.0, "Decay of the exponential moving average (EMA) of the weights; 0 turns it off.", ge=0, lt=1
    )
    ema_warmup: bool = option(False, "Ramp the EMA decay up from 0; helps in runs of only a few thousand steps.")

    # Augmentation
    repeats: int = option(
        1, "Repeated augmentation: copies of each image per epoch (the length of the epoch stays the same).", ge=1
    )

    # Validation
    eval_every: int = option(
        1, "Validate at all training sizes every this many epochs and after the last one; 0: never.", ge=0
    )

    # Machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "auto is bfloat16 on GPUs and CPUs that support it in hardware (AMX), and float32 elsewhere."
    )
    compile: bool = option(False, "Use torch.compile, with one graph per size.")
    grad_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    fsdp: bool = option(
        False, "Shard weights and optimiser state over the processes (FSDP2) instead of replicating them (DDP)."
    )
    workers: int | None = option(
        None, "Data loading workers per process; the default depends on the number of CPUs.", ge=0
    )
    deterministic: bool = option(False, "Use only deterministic kernels (slower on GPUs).")

    # Logging, saving and stopping
    log_every: int = option(50, "Optimiser steps between log entries.", ge=1)
    wandb: bool = option(False, "Also log to Weights & Biases (TensorBoard is always on).")
    trackio: bool = option(False, "Also log to trackio.")
    progress: bool = option(True, "Show a progress bar on a terminal, or print a line per epoch elsewhere.")
    save_every_minutes: float = option(
        10.0, "Save the training state this often, besides at the end of every epoch; 0 turns this off.", ge=0
    )
    save_every_steps: int | None = option(None, "Also save the training state every this many optimiser steps.", ge=1)
    keep: int = option(2, "Number of training states to keep; an older one is used if the newest is damaged.", ge=1)
    resume: Literal["auto", "yes", "no"] = option(
        "auto", "auto: continue the run in `output` if there is one; yes: fail if there is none; no: replace it."
    )
    time_limit: float | None = option(
        None, "Save and stop after this many minutes; the same command then continues the run.", gt=0
    )
    early_stop: int | None = option(None, "Stop after this many epochs without a better validation score.", ge=1)
    fraction: float = option(1.0, "Dry run: use this fraction of every epoch and of the validation images.", gt=0, le=1)

    def check(self) -> None:
        super().check()
        count = len(self.shapes)
        if self.sizes_per_step is not None and self.sizes_per_step > count:
            raise UserError(f"sizes_per_step is {self.sizes_per_step}; it must not exceed the number of sizes, {count}")
        if self.batch_size % self.accumulation:
            raise UserError(f"batch_size {self.batch_size} must be a multiple of accumulation, {self.accumulation}")
        if self.early_stop is not None and not self.eval_every:
            raise UserError("early_stop needs validations; set eval_every to 1 or more")
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"warmup_epochs is {self.warmup_epochs:g}; it must be less than epochs, {self.epochs}")
        if self.distillation == "kl" and self.distillation_target != "logit":
            raise UserError("distillation kl compares probabilities; set distillation_target logit")
        if self.schedule == "epoch" and self.decay != "cosine":
            raise UserError(f"schedule epoch supports only decay cosine; set schedule iteration for decay {self.decay}")
        if (self.decay == "step") != bool(self.drops):
            raise UserError(
                f"decay is {self.decay} and drops are {self.drops}; step needs drops, any other decay needs drops=none"
            )
        if self.fsdp and self.ema_decay:
            raise UserError("fsdp does not support a moving average of the weights; set ema_decay 0 or fsdp false")

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else self.base_lr * self.batch_size / 512

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values, as written to config.yaml."""
        return {"task": self.task, **self.model_dump()}

    def __reduce__(self) -> Any:  # the class is created at run time, so pickle cannot find it by name
        return _rebuild, (self.task, dict(self))


@cache
def config_of(task: str) -> type[RunConfig]:
    """Return the class of a run's options for a task. The task's own default for a shared option takes precedence."""
    options = TASKS[task].options
    config: Any = create_model(
        options.__name__, __base__=(options, RunConfig), __module__=__name__, __doc__=options.__doc__
    )
    config.task = task
    made: type[RunConfig] = config
    return made


def _rebuild(task: str, values: dict[str, Any]) -> RunConfig:
    return config_of(task)(**values)
