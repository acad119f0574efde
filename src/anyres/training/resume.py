"""How a run is saved, and how it continues: whose folder it is, what may change, which state is taken."""

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
    """Keep the run folder for this run, after making sure that the run replaces and removes nothing but its own."""
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
    """Continue the run in the folder if there is one and `resume` allows it, else prepare the folder for a new one."""
    config, accelerator = run.config, run.accelerator
    if accelerator.is_main_process:
        if config.resume == "no":
            state.clear_run(run.folder)
        state.prepare_folder(run.folder)
    accelerator.wait_for_everyone()
    if not resume(run):
        if config.resume == "yes":
            raise UserError(f"{run.folder} has no saved state to resume; set resume auto to start a run there")
        if config.init_from is not None:
            start_from(run, config.init_from)
    if accelerator.is_main_process:
        state.write_config(run.folder, config.to_dict())
    write_results(run, "running")


def resume(run: Run) -> bool:
    """Take over the newest state that can be used; False if there is none at all."""
    states = state.saved_states(run.folder)
    for path in states:
        # The processes agree after each step: what one cannot read none must take over.
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
    """(result, None), or what went wrong in any process: a damaged file may lead to any error at all."""
    result = problem = None
    try:
        result = function(*arguments)
    except UserError:  # the state is of another run
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return result, next(filter(None, gather_object([problem])), None)


def take_state(run: Run, position: state.Position, content: dict[str, Any]) -> None:
    """Continue where a state is. Raises whatever one that does not fit leads to."""
    check_identity(run, content["identity"])
    if position.epoch != len(position.rows) or not 0 <= position.batch <= run.batches_per_epoch:
        raise ValueError(f"it is at batch {position.batch} of epoch {position.epoch} with {len(position.rows)} rows")
    load_whole_states(run, content["model"], content["optimizer"])
    check_moments(run.optimizer)
    if run.ema is not None:
        run.ema.module.load_state_dict(content["ema"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(content["scaler"])
    run.position = position
    take_share(run, content["ranks"])


def check_moments(optimizer: Any) -> None:
    """Raises ValueError if what an optimiser remembers cannot be: a damaged value would end the next step. Which names
    there are is the optimiser's affair, but they are the same for parameters of one shape, and a name holds one kind of
    value."""
    names: dict[Any, set[str]] = {}
    kinds: dict[str, type] = {}
    for parameter, remembered in optimizer.state.items():
        same = names.setdefault(parameter.shape, set(remembered)) == set(remembered)
        for name, value in remembered.items():
            if value is None:
                continue
            kind = Tensor if isinstance(value, Tensor) else type(value)  # a sharded tensor is one, too
            if kinds.setdefault(name, kind) is not kind or not issubclass(kind, Tensor | int | float):
                raise ValueError(f"its optimiser's {name} is {type(value).__name__} for a parameter")
        if not same:
            raise ValueError("its optimiser remembers different things for parameters of one shape")


def take_share(run: Run, ranks: list[dict[str, Any]]) -> None:
    """Each process takes back its generators and sums. After a change of their number the first takes all sums, scaled
    so that a batch counts once for every process of now."""
    rank, world, device = run.accelerator.process_index, run.accelerator.num_processes, run.accelerator.device
    if not ranks:
        raise ValueError("it has the generators of no process")
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
    """Write the state to resume from; weights that are not finite are refused, so that the one before stays useful."""
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
"""Options that a resumed run may change. The data may have moved, but must have as many batches of the same classes."""


def identity(run: Run) -> dict[str, Any]:
    """What must stay the same for a resumed run to be the same run."""
    options = {name: value for name, value in run.config.to_dict().items() if name not in CHANGEABLE}
    names = run.loader.source.label_names
    return {
        **options,
        "batches per epoch": run.batches_per_epoch,
        "classes": len(names),
        **{f"class {place}": name for place, name in enumerate(names)},
    }


def check_identity(run: Run, saved: dict[str, Any]) -> None:
    """Raises UserError for a state of another run; what it does not say, since an earlier version wrote it, passes."""
    saved = run.config.translated(saved)
    for name, value in identity(run).items():
        if saved.get(name, value) != value:
            raise UserError(
                f"{run.folder} was started with {name} {saved[name]} and now it is {value}; choose another output "
                "folder (init_from can take over the weights), or set resume no to replace the run"
            )
