"""Everything a training run can be told: one flat set of options, the run's own and those of its task."""

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
"""Where a run folder keeps its options."""


class RunConfig(TaskOptions):
    """Options that every training run has, besides those of its task; `config_of` puts the two together."""

    task: ClassVar[str]
    renamed: ClassVar[Mapping[str, str]] = {"window": "sizes_per_step"}
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {"precision": {"bf16": "bfloat16", "fp16": "float16"}}

    # What is trained, on what, into which folder
    output: str = option("runs/train", "Run folder: weights, metrics, logs and the state to resume from.")
    init: Literal["published", "scaled"] = option(
        "published", "First weights: the paper's, or scaled by each layer's inputs, from which narrow networks learn."
    )
    epoch_size: int | None = option(
        None, "Images per epoch: needed for streams of unknown length, a cut for others.", ge=1
    )
    max_bad_fraction: float = option(0.01, "Share of unreadable images in an epoch at which the run stops.", ge=0, le=1)

    # Sizes
    mode: Literal["replicate", "sample"] = option(
        "replicate", "Every image at all sizes per step, or a size per batch."
    )
    per: Literal["iteration", "epoch"] = option(
        "iteration", "How often mode=sample draws a size, the same on all processes."
    )
    sizes_per_step: int | None = option(
        None, "mode=replicate with only this many neighbouring sizes per step, sliding.", ge=1
    )
    distillation: Literal["none", "smooth-l1", "l2", "cosine", "kl"] = option(
        "smooth-l1", "Scale consistency: how a replica is compared with the next larger one."
    )
    distillation_target: Literal["cls", "gap", "logit"] = option(
        "cls", "Scale consistency: what is compared (vector that enters the head, mean patch token, logits)."
    )
    distillation_alpha: float = option(1.0, "Weight of scale consistency.", ge=0)

    # Optimisation
    epochs: int = option(300, "Passes over the training images.", ge=1)
    batch_size: int = option(
        128, "Images per optimiser step, over all processes and accumulated passes together.", ge=1
    )
    accumulation: int = option(1, "Passes that a step is split into, to save memory; their gradients add up.", ge=1)
    optimizer: str = option("adamw", "Optimiser, a name of timm.optim.")
    lr: float | None = option(None, "Peak learning rate; otherwise base_lr x batch_size / 512.", gt=0)
    base_lr: float = option(5e-4, "Peak learning rate of a batch_size of 512.", gt=0)
    weight_decay: float = option(0.05, "Weight decay; not for biases, norms and the model's no_weight_decay().", ge=0)
    decay_all: bool = option(
        False, "Weight decay for every parameter, without exceptions (PVT's and P2T's dense settings)."
    )
    schedule: Literal["iteration", "epoch"] = option(
        "iteration", "Learning rate: changed at every step (ResFormer), or once per epoch as DeiT does."
    )
    decay: Literal["cosine", "linear", "poly", "step"] = option(
        "cosine", "How the learning rate falls; poly has the power 0.9, step is 0.1 at each of `drops`."
    )
    drops: list[float] = option([], "decay=step: epochs after which the learning rate is a tenth.")
    warmup_epochs: float = option(5.0, "Epochs of linear warm-up.", ge=0)
    warmup_lr: float = option(0.0, "Learning rate at the start of the warm-up (not scaled).", ge=0)
    min_lr: float = option(1e-5, "Learning rate at the end (not scaled).", ge=0)
    clip_grad: float | None = option(None, "Largest norm of the gradient.", gt=0)
    ema_decay: float = option(0.0, "Decay of an exponential moving average of the weights; 0 keeps none.", ge=0, lt=1)
    ema_warmup: bool = option(False, "Let the average's decay grow from 0, for runs of a few thousand steps.")

    # Augmentation
    repeats: int = option(1, "Repeated augmentation: copies of an image per epoch (an epoch keeps its length).", ge=1)

    # Validation
    eval_every: int = option(
        1, "Epochs between validations at all training sizes; the last one always validates.", ge=1
    )

    # Machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "auto is bfloat16 on GPUs and CPUs that do it in hardware (AMX), float32 elsewhere."
    )
    compile: bool = option(False, "torch.compile, one graph per size.")
    grad_checkpointing: bool = option(False, "Compute activations again in the backward pass to save memory.")
    fsdp: bool = option(False, "Shard weights and optimiser over the processes (FSDP2) instead of copying them (DDP).")
    workers: int | None = option(None, "Data loading processes per process; otherwise from the number of CPUs.", ge=0)
    deterministic: bool = option(False, "Only deterministic kernels (slower on GPUs).")

    # Records, saving and stopping
    log_every: int = option(50, "Optimiser steps between log entries.", ge=1)
    wandb: bool = option(False, "Log to Weights & Biases too (TensorBoard always).")
    trackio: bool = option(False, "Log to trackio too.")
    progress: bool = option(True, "Progress bar on a terminal, a line per epoch elsewhere; or silence.")
    save_every_minutes: float = option(
        10.0, "Save to resume from this often, besides every epoch's end; 0: never.", ge=0
    )
    save_every_steps: int | None = option(None, "Also save it after this many optimiser steps.", ge=1)
    keep: int = option(2, "States to keep; the older ones serve if a disk spoils the newest.", ge=1)
    resume: Literal["auto", "yes", "no"] = option(
        "auto", "Continue the run in `output`: if there is one, or fail, or start over and replace it."
    )
    time_limit: float | None = option(None, "Minutes after which the run saves and stops; resume continues it.", gt=0)
    early_stop: int | None = option(None, "Stop after this many epochs without a better validation.", ge=1)
    fraction: float = option(1.0, "Dry run on this part of every epoch and of the validation images.", gt=0, le=1)

    def check(self) -> None:
        super().check()
        count = len(self.shapes)
        if self.sizes_per_step is not None and self.sizes_per_step > count:
            raise UserError(f"sizes_per_step is {self.sizes_per_step}; it must not exceed the number of sizes, {count}")
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
                f"decay is {self.decay} and drops are {self.drops}; step needs drops, and nothing else (drops=none)"
            )
        if self.fsdp and self.ema_decay:
            raise UserError("fsdp keeps no moving average of the weights; set ema_decay 0 or fsdp false")

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else self.base_lr * self.batch_size / 512

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.yaml."""
        return {"task": self.task, **self.model_dump()}

    def __reduce__(self) -> Any:  # the class was made at run time
        return _rebuild, (self.task, dict(self))


@cache
def config_of(task: str) -> type[RunConfig]:
    """The options of a run for a task. Where the task has a default of its own for an option of the run, it counts."""
    options = TASKS[task].options
    config: Any = create_model(
        options.__name__, __base__=(options, RunConfig), __module__=__name__, __doc__=options.__doc__
    )
    config.task = task
    made: type[RunConfig] = config
    return made


def _rebuild(task: str, values: dict[str, Any]) -> RunConfig:
    return config_of(task)(**values)
