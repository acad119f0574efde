"""Training, on one process or many: `train(config)` reads like the procedure, what it calls stands below it.

A step takes a batch at several sizes, back-propagates one replica after the other (losses.py) and updates the weights
once. Processes share the work by DDP or FSDP2. Accelerate starts them (torchrun, accelerate launch), scales fp16 and
talks to the trackers. What they must decide together (stop, save, a loss that is not finite) they vote on once per step
(processes.py).
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from anyres.errors import UserError
from anyres.evaluation import evaluate
from anyres.io.files import locked
from anyres.training import state
from anyres.training.config import RunConfig
from anyres.training.display import Display, images_per_second, start_trackers
from anyres.training.losses import backward_replicas
from anyres.training.processes import (
    Decision,
    gather,
    load_whole_states,
    no_sync,
    peers_explained,
    precision_of,
    refresh_plain,
    start_processes,
    start_vote,
    whole_states,
)
from anyres.training.schedule import learning_rate, learning_rate_by_epoch
from anyres.training.setup import Run, build, start_from

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What came of a run."""

    folder: Path
    status: str
    """finished, early stop, time limit or signal; after the last two, resume continues."""
    score: float | None
    """Best validation score in percent (the task's: top-1, mIoU, AP), the mean over the training sizes: that of
    `folder / "best"`."""
    rows: list[dict[str, Any]]
    """The rows of metrics.csv."""
    bad_images: dict[str, str]
    """Unreadable images that were skipped: name -> reason."""


def train(config: RunConfig) -> RunResult:
    """Train as `config` says, or continue the run in `config.output`.

    Raises:
        UserError: what a person has to put right, in one sentence; also a loss that is not finite (the weights are not
            updated with it), too many unreadable images, and another process that has ended.
    """
    accelerator = start_processes(config)
    try:
        with peers_explained(), claimed_folder(config, accelerator):
            run = build(config, accelerator)
            resume_or_start(run)
            start_trackers(run)
            display = Display(run)
            with stop_signals(run), display.shown():
                while not is_done(run):
                    train_epoch(run, display)
                    if not run.status:
                        finish_epoch(run, display)
            return conclude(run)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


# An epoch, a step -----------------------------------------------------------------------------------------------------


def train_epoch(run: Run, display: Display) -> None:
    """Train from `run.position` to the end of its epoch, or until the processes agree to stop (see `run.status`)."""
    config, position = run.config, run.position
    if position.batch >= run.batches_per_epoch:  # stopped between the last step and the validation
        return
    run.task.set_training_mode(run.config, run.forward)
    batches = run.loader.epoch(position.epoch, start_step=position.batch)
    began = time.monotonic()
    while position.batch < run.batches_per_epoch:
        rate = set_learning_rate(run)
        decision = step(run, batches)
        position.updates += 1
        began, passed = time.monotonic(), time.monotonic() - began
        position.epoch_seconds += passed
        position.seconds += passed
        display.step(run, rate)
        if decision.stop or decision.timeout:
            run.status = "signal" if decision.stop else "time limit"
            save(run)
            return
        due = config.save_every_steps is not None and position.updates % config.save_every_steps == 0
        if (due or decision.save) and position.batch < run.batches_per_epoch:  # an epoch's end saves anyway
            save(run)


def step(run: Run, batches: Iterator[Any]) -> Decision:
    """One optimiser step over `accumulation` batches. Raises UserError before the update if a loss is not finite."""
    config, position, accelerator = run.config, run.position, run.accelerator
    seen: list[tuple[Any, list[Tensor]]] = []
    vote: list[Callable[[], Decision]] = []

    def start_voting(losses: list[Tensor]) -> None:
        vote.append(start_vote(run, [loss for _, earlier in seen for loss in earlier] + losses))

    for index in range(config.accumulation):
        last = index == config.accumulation - 1
        batch = next(batches)
        views, targets = send_to_device((batch.views, batch.targets), accelerator.device, non_blocking=True)
        views, targets = run.objective.mix(views, targets, position.epoch, position.batch)
        losses = backward_replicas(
            run.forward,
            views,
            targets,
            run.objective,
            kind=config.distillation,
            target=config.distillation_target,
            alpha=config.distillation_alpha,
            share=1 / config.accumulation,
            backward=accelerator.backward,
            no_sync=lambda: no_sync(run),
            synchronise=last,
            before_last=start_voting if last else None,
        )
        seen.append((batch, losses))
        record(run, batch, losses)
        position.batch += 1
    decision = vote[0]()
    if decision.not_finite:
        raise UserError(describe_failure(run, seen))
    if config.clip_grad is not None:
        accelerator.clip_grad_norm_(run.model.parameters(), config.clip_grad)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.ema is not None:
        run.ema.update(run.model, step=position.updates + 1)
    return decision


FLOAT64 = ("cpu", "cuda")
"""Kinds of devices that have it."""


def record(run: Run, batch: Any, losses: list[Tensor]) -> None:
    """Add a batch to the epoch's metrics, without waiting for the device."""
    sums = run.position.sums
    for size, loss in zip(batch.sizes, losses, strict=True):
        name = f"loss_{shape_name(size)}"
        if name not in sums:
            wide = torch.float64 if loss.device.type in FLOAT64 else torch.float32
            sums[name] = [torch.zeros((), dtype=wide, device=loss.device), 0]
        sums[name][0] += loss
        sums[name][1] += 1
    run.position.bad |= {bad.name: bad.reason for bad in batch.bad}


def describe_failure(run: Run, seen: list[tuple[Any, list[Tensor]]]) -> str:
    """One sentence on the batch whose loss is not finite, with the names of its images."""
    advice = "lower the learning rate, set clip_grad or use precision float32"
    for batch, losses in seen:
        for size, loss in zip(batch.sizes, losses, strict=True):
            if not math.isfinite(loss):
                names = ", ".join(map(str, batch.names[:8])) + (", ..." if len(batch.names) > 8 else "")
                return (
                    f"the loss is {float(loss)} at epoch {batch.epoch + 1}, batch {batch.step + 1}, size "
                    f"{shape_name(size)}, images {names} (the weights were not updated with it): {advice}"
                )
    return f"the loss of another process is not finite (the weights were not updated with it): {advice}"


def set_learning_rate(run: Run) -> float:
    """Give the optimiser the rate of the coming step; `lr_scale` is a group's layer-wise factor."""
    config, position = run.config, run.position
    shape: dict[str, Any] = {"peak": config.peak_lr, "epochs": config.epochs, "min_lr": config.min_lr}
    shape |= {"warmup_epochs": config.warmup_epochs, "warmup_lr": config.warmup_lr}
    if config.schedule == "epoch":
        rate = learning_rate_by_epoch(position.epoch, **shape)
    else:
        shape |= {"decay": config.decay, "drops": config.drops}
        rate = learning_rate(position.epoch + position.batch / run.batches_per_epoch, **shape)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    return rate


# The end of an epoch and of the run -----------------------------------------------------------------------------------


def finish_epoch(run: Run, display: Display) -> None:
    """Validate, keep the row and the weights, save.

    Weights are written before the state and metrics.csv after it: a kill in between repeats what it lost. The epoch
    itself is saved before the validation, which may fail: after a resume only that is repeated.
    """
    config, position = run.config, run.position
    validates = (position.epoch + 1) % config.eval_every == 0 or position.epoch + 1 == config.epochs
    if validates:
        save(run)
    row = epoch_row(run)
    refresh_plain(run)
    if validates:
        row |= validate(run, run.plain, "")
        if run.ema is not None:
            row |= validate(run, run.ema.module, "ema_")
    position.rows.append(row)
    position.epoch += 1
    position.batch, position.sums, position.epoch_seconds = 0, {}, 0.0
    write_weights(run, row)
    save(run)
    write_results(run, "running")
    display.epoch(run, row)


def epoch_row(run: Run) -> dict[str, Any]:
    """The epoch's row of metrics.csv, over all processes."""
    position = run.position
    own = {name: (float(total), count) for name, (total, count) in position.sums.items()}
    shares = gather(run, (own, position.bad))
    totals: dict[str, list[float]] = {}
    for sums, bad in shares:
        position.bad |= bad
        for name, (total, count) in sums.items():
            before = totals.get(name, [0.0, 0])
            totals[name] = [before[0] + total, before[1] + count]
    names = [f"loss_{shape_name(shape)}" for shape in run.config.shapes]
    losses = {name: totals[name] for name in names if name in totals}
    return {
        "epoch": position.epoch + 1,
        "updates": position.updates,
        "lr": max(group["lr"] for group in run.optimizer.param_groups),
        "loss": sum(total for total, _ in losses.values()) / sum(count for _, count in losses.values()),
        **{name: total / count for name, (total, count) in losses.items()},
        "images_per_second": round(images_per_second(run), 1),
        "seconds": round(position.seconds, 1),
        "bad_images": len(position.bad),
    }


def validate(run: Run, model: Any, prefix: str) -> dict[str, float]:
    """The task's scores at every training size, and before them the mean of the main one, by which the best weights
    are chosen."""
    accelerator, score = run.accelerator, run.task.score
    precision = precision_of(accelerator)
    columns: dict[str, float] = {}
    for shape in run.config.shapes:
        batch_size = run.config.eval_batch_size
        measured = evaluate(model, run.val_source, shape, batch_size, accelerator.device, precision)
        scores = run.task.columns_of(measured.scores)
        columns |= {f"{prefix}{name}_{shape_name(shape)}": value for name, value in scores.items()}
    main = [columns[f"{prefix}{score}_{shape_name(shape)}"] for shape in run.config.shapes]
    return {f"{prefix}{score}": sum(main) / len(main), **columns}


def write_weights(run: Run, row: dict[str, Any]) -> None:
    """last/ and, where the score improved, best/; for the moving average last_ema/ and best_ema/."""
    best = run.position.best
    ema = None if run.ema is None else run.ema.module
    for suffix, prefix, model in (("", "", run.plain), ("_ema", "ema_", ema)):
        if model is None:
            continue
        folders = [run.folder / f"last{suffix}"]
        score = row.get(f"{prefix}{run.task.score}")
        if score is not None and score > best.get(f"best{suffix}", -1.0):
            best |= {f"best{suffix}": score, f"best{suffix}_epoch": row["epoch"]}
            folders.append(run.folder / f"best{suffix}")
        if run.accelerator.is_main_process:
            for folder in folders:
                model.save_pretrained(folder)


def is_done(run: Run) -> bool:
    """Whether the run ends here; `run.status` says why."""
    config, position = run.config, run.position
    patience = config.early_stop
    if not run.status and position.epoch >= config.epochs:
        run.status = "finished"
    waited = position.epoch - position.best.get("best_epoch", position.epoch)
    if not run.status and patience is not None and waited >= patience:
        run.status = "early stop"
    return bool(run.status)


def conclude(run: Run) -> RunResult:
    write_results(run, run.status)
    position = run.position
    run.accelerator.wait_for_everyone()
    return RunResult(run.folder, run.status, position.best.get("best"), position.rows, position.bad)


def write_results(run: Run, status: str) -> None:
    """metrics.csv and summary.json."""
    position, config, accelerator = run.position, run.config, run.accelerator
    if not accelerator.is_main_process:
        return
    state.write_metrics(run.folder, position.rows)
    sources = {"train": run.loader.source, "val": run.val_source}
    reports = {split: source.report for split, source in sources.items() if hasattr(source, "report")}
    summary = {
        "status": status,
        "task": config.task,
        "model": config.model,
        "parameters": sum(parameter.numel() for parameter in run.plain.parameters()),
        "sizes": [list(shape) for shape in config.shapes],
        "epochs": position.epoch,
        "updates": position.updates,
        "best": position.best,
        "last": position.rows[-1] if position.rows else {},
        "bad_images": {"count": len(position.bad), "files": position.bad},
        **({"annotations": reports} if reports else {}),  # counts of data.detection.REPORT
        "seconds": round(position.seconds, 1),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "precision": precision_of(accelerator),
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "accelerate": accelerate.__version__},
    }
    state.write_summary(run.folder, summary)


# Saving and resuming --------------------------------------------------------------------------------------------------


def save(run: Run) -> None:
    """Write the state to resume from; weights that are not finite are refused, so that the one before stays useful."""
    if not torch.stack([parameter.isfinite().all() for parameter in run.model.parameters()]).all():
        raise UserError(
            f"the weights are not finite after step {run.position.updates}, so they were not saved; resume from the "
            "state before with a lower learning rate, clip_grad or precision float32"
        )
    model, optimizer = whole_states(run)
    sums = {name: [total.cpu(), count] for name, (total, count) in run.position.sums.items()}
    ranks = gather(run, {"rng": state.rng_state(), "sums": sums})
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
        found, problem = attempt(run, state.load_state, path)
        if problem is None:
            _, problem = attempt(run, take_state, run, *found)
        if problem is None:
            return True
        logger.warning("%s cannot be used (%s); trying the one before", path, problem)
    if states:
        raise UserError(
            f"no state in {run.folder / 'state'} can be used; remove that folder to start over, or restore it"
        )
    return False


def attempt(run: Run, function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """(result, None), or what went wrong in any process: a damaged file may lead to any error at all."""
    result = problem = None
    try:
        result = function(*arguments)
    except UserError:  # the state is of another run
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return result, next(filter(None, gather(run, problem)), None)


def take_state(run: Run, position: state.Position, content: dict[str, Any]) -> None:
    """Continue where a state is. Raises whatever one that does not fit leads to."""
    check_identity(run, content["identity"])
    if position.epoch != len(position.rows) or not 0 <= position.batch <= run.batches_per_epoch:
        raise ValueError(f"it is at batch {position.batch} of epoch {position.epoch} with {len(position.rows)} rows")
    load_whole_states(run, content["model"], content["optimizer"])
    if run.ema is not None:
        run.ema.module.load_state_dict(content["ema"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(content["scaler"])
    run.position = position
    take_share(run, content["ranks"])


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


CHANGEABLE = frozenset(
    [
        *("output", "data", "val_data", "init_from", "workers", "device", "compile", "grad_checkpointing"),
        *("log_every", "wandb", "trackio", "progress", "keep", "resume", "save_every_minutes", "save_every_steps"),
        *("time_limit", "early_stop", "eval_every", "eval_batch_size", "max_bad_fraction"),
    ]
)
"""Options that a resumed run may change. The data may have moved, but must have as many batches."""


def identity(run: Run) -> dict[str, Any]:
    """What must stay the same for a resumed run to be the same run."""
    options = {name: value for name, value in run.config.to_dict().items() if name not in CHANGEABLE}
    return {**options, "batches per epoch": run.batches_per_epoch, "classes": len(run.loader.source.label_names)}


def check_identity(run: Run, saved: dict[str, Any]) -> None:
    saved = run.config.translated(saved)
    for name, value in identity(run).items():
        if saved.get(name, value) != value:
            raise UserError(
                f"{run.folder} was started with {name} {saved[name]} and now it is {value}; choose another output "
                "folder (init_from can take over the weights), or set resume no to replace the run"
            )


# Small things ---------------------------------------------------------------------------------------------------------


@contextmanager
def stop_signals(run: Run) -> Iterator[None]:
    """Collect SIGINT and SIGTERM, so that the run can save and stop cleanly; a second one acts at once."""

    def handle(number: int, _frame: Any) -> None:
        if run.signals:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        run.signals.append(number)
        if run.accelerator.is_main_process:  # not print: the signal may have come in the middle of one
            os.write(2, b"anyres: saving and stopping after this step; a second signal stops at once.\n")

    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shape_name(shape: Any) -> str:
    """224 or 160x256."""
    height, width = shape
    return str(height) if height == width else f"{height}x{width}"
