"""Save and resume a run: check the ownership of its folder, choose a training state and check that it fits the run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from anyres.errors import UserError
from anyres.io.files import locked
from anyres.training import state
from anyres.training.config import RunConfig
from anyres.training.processes import load_whole_states, whole_states
from anyres.training.records import write_results
from anyres.training.run import Run
from anyres.training.setup import start_from

logger = logging.getLogger(__name__)


@contextmanager
def claimed_folder(config: RunConfig, accelerator: Accelerator) -> Iterator[None]:
    """Lock the run folder, after checking that the run would not overwrite or delete files that it did not write."""
    if not accelerator.is_main_process:
        yield
        return
    folder = Path(os.path.realpath(config.output))
    for name in ("data", "val_data"):
        if os.path.realpath(getattr(config, name) or "digits") == str(folder):
            raise UserError(f"output {config.output} is the folder of {name}; choose another output")
    for name in ("init_from", "teacher", "teacher_weights"):
        value = getattr(config, name, None)
        if config.resume == "no" and value and Path(os.path.realpath(value)).is_relative_to(folder):
            raise UserError(f"resume no would remove {name} {value}; choose another output")
    with locked(config.output):
        state.check_folder(Path(config.output), config.to_dict())
        yield


def resume_or_start(run: Run) -> None:
    """Continue the run in the folder if there is one and `resume` allows it; otherwise start a new one."""
    config, accelerator = run.config, run.accelerator
    if accelerator.is_main_process:
        if config.resume == "no":
            state.clear_run(run.folder)
        state.prepare_folder(run.folder)
    accelerator.wait_for_everyone()
    if not resume(run):
        if config.resume == "yes":
            raise UserError(f"{run.folder} has no saved state to resume from; set resume auto to start a run there")
        if config.init_from is not None:
            start_from(run, config.init_from)
    if accelerator.is_main_process:
        state.write_config(run.folder, config.to_dict())
    write_results(run, "running")


def resume(run: Run) -> bool:
    """Load the newest usable state. Return False if there is no state; raise UserError if none is usable."""
    states = state.saved_states(run.folder)
    for path in states:
        # The processes agree after each attempt, because none may load a state that another cannot read.
        found, problem = attempt(state.load_state, path)
        if problem is None:
            _, problem = attempt(take_state, run, *found)
        if problem is None:
            return True
        logger.warning("%s cannot be used (%s); trying the one before", path, problem)
    if states:
        raise UserError(
            f"no state in {run.folder / 'state'} can be used; remove that folder to start over, or restore it"
        )
    return False


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """Call a function and return (result, error message), where the message is None if it succeeded in every process.

    A damaged file can raise any exception, so all but UserError are caught.
    """
    result = problem = None
    try:
        result = function(*arguments)
    except UserError:  # the state belongs to another run
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return result, next(filter(None, gather_object([problem])), None)


def take_state(run: Run, position: state.Position, content: dict[str, Any]) -> None:
    """Restore the run from a state. Raises an exception of any type if the state does not fit."""
    check_identity(run, content["identity"])
    if position.epoch != len(position.rows) or not 0 <= position.batch <= run.batches_per_epoch:
        raise ValueError(
            f"it is at batch {position.batch} of epoch {position.epoch} and has {len(position.rows)} rows of metrics"
        )
    load_whole_states(run, content["model"], content["optimizer"])
    check_moments(run.optimizer)
    if run.ema is not None:
        run.ema.module.load_state_dict(content["ema"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(content["scaler"])
    run.position = position
    take_share(run, content["ranks"])


def check_moments(optimizer: Any) -> None:
    """Raise ValueError for an implausible optimiser state.

    A damaged value would make the next step fail, and with a tensor of another shape torch's fused kernels write beyond
    its end. The entries depend on the optimiser, but parameters of the same shape must have the same names, and all
    values of a name must be of the same type. With fused kernels every tensor but the step has its parameter's shape.
    Others, such as Adafactor, also keep means of rows; but a name whose tensors mostly have that shape always does.
    """
    names: dict[Any, set[str]] = {}
    kinds: dict[str, type] = {}
    fits: dict[str, list[bool]] = {}
    for parameter, remembered in optimizer.state.items():
        same = names.setdefault(parameter.shape, set(remembered)) == set(remembered)
        for name, value in remembered.items():
            if value is None:
                continue
            kind = Tensor if isinstance(value, Tensor) else type(value)  # includes sharded tensors
            if kinds.setdefault(name, kind) is not kind or not issubclass(kind, Tensor | int | float):
                raise ValueError(f"its optimiser has the type {type(value).__name__} for {name} of a parameter")
            if isinstance(value, Tensor):
                shape = torch.Size() if name == "step" else parameter.shape
                fits.setdefault(name, []).append(value.shape == shape)
        if not same:
            raise ValueError("its optimiser has different entries for parameters of the same shape")
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for name, fitting in fits.items():
        if not all(fitting) and (fused or 2 * sum(fitting) > len(fitting)):
            raise ValueError(f"its optimiser has a {name} of another shape than its parameter")


def take_share(run: Run, ranks: list[dict[str, Any]]) -> None:
    """Restore this process's random generators and metric sums.

    If the number of processes has changed, the generators are not restored, and the first process takes over all sums,
    scaled so that each batch counts once per current process.
    """
    rank, world, device = run.accelerator.process_index, run.accelerator.num_processes, run.accelerator.device
    if not ranks:
        raise ValueError("it has no random generator states")
    weight = world / len(ranks)
    if len(ranks) == world:
        ranks = [ranks[rank]]
        state.set_rng_state(ranks[0]["rng"])
    elif rank > 0:
        ranks = []
    run.position.sums = {}
    for share in ranks:
        for name, (total, count) in share["sums"].items():
            before = run.position.sums.get(name, [0.0, 0])
            run.position.sums[name] = [before[0] + weight * total.to(device), before[1] + weight * count]


def save(run: Run) -> None:
    """Write a training state. Raises UserError if the weights are not finite, so that the previous one is kept."""
    if not torch.stack([parameter.isfinite().all() for parameter in run.model.parameters()]).all():
        raise UserError(
            f"the weights are not finite after step {run.position.updates}, so they were not saved; resume from the "
            "state before with a lower learning rate, clip_grad or precision float32"
        )
    model, optimizer = whole_states(run)
    sums = {name: [total.cpu(), count] for name, (total, count) in run.position.sums.items()}
    ranks = gather_object([{"rng": state.rng_state(), "sums": sums}])
    if run.accelerator.is_main_process:
        content = {
            "identity": identity(run),
            "model": model,
            "optimizer": optimizer,
            "ema": None if run.ema is None else run.ema.module.state_dict(),
            "scaler": None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict(),
            "ranks": ranks,
        }
        state.save_state(run.folder, run.position, content, run.config.keep)
    run.saved = time.monotonic()


CHANGEABLE = frozenset(
    [
        *("output", "data", "val_data", "init_from", "workers", "device", "compile", "grad_checkpointing"),
        *("log_every", "wandb", "trackio", "progress", "keep", "resume", "save_every_minutes", "save_every_steps"),
        *("time_limit", "early_stop", "eval_every", "eval_batch_size", "max_bad_fraction"),
    ]
)
"""Options that may change on resume. The data may have moved, but the batches per epoch and classes must not change."""


def identity(run: Run) -> dict[str, Any]:
    """Return everything that must not change when a run is resumed."""
    options = {name: value for name, value in run.config.to_dict().items() if name not in CHANGEABLE}
    names = run.loader.source.label_names
    return {
        **options,
        "batches per epoch": run.batches_per_epoch,
        "classes": len(names),
        **{f"class {place}": name for place, name in enumerate(names)},
    }


def check_identity(run: Run, saved: dict[str, Any]) -> None:
    """Raise UserError if a state belongs to another run; values missing from an earlier version's state are ignored."""
    saved = run.config.translated(saved)
    for name, value in identity(run).items():
        if saved.get(name, value) != value:
            raise UserError(
                f"{run.folder} was started with {name} {saved[name]} and now it is {value}; choose another output "
                "folder (init_from can take over the weights), or set resume no to replace the run"
            )
