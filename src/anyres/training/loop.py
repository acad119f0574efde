"""The training loop, on one process or many: `train(config)`.

A step takes a batch at several sizes, backpropagates through one replica after another (losses.py) and updates the
weights once. The other modules build the run (setup.py), handle distributed training (processes.py), save and resume
(resume.py), write metrics and weights (records.py) and show progress (display.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor

from anyres.errors import UserError
from anyres.evaluation import evaluate
from anyres.training.config import RunConfig
from anyres.training.display import Display
from anyres.training.losses import backward_replicas
from anyres.training.processes import (
    Decision,
    clip_gradients,
    no_sync,
    peers_explained,
    precision_of,
    refresh_plain,
    start_processes,
    start_vote,
    stop_signals,
)
from anyres.training.records import (
    describe_failure,
    epoch_row,
    log_epoch,
    log_step,
    next_batch,
    record_batch,
    record_gradients,
    shape_name,
    trackers,
    write_results,
    write_weights,
)
from anyres.training.resume import claimed_folder, resume_or_start, save
from anyres.training.run import Run, RunResult
from anyres.training.schedule import rate_at
from anyres.training.setup import build


def train(config: RunConfig) -> RunResult:
    """Train as `config` says, or continue the run in `config.output`.

    Raises:
        UserError: if an option or the data is unusable, if a loss is not finite (the weights are not updated with it),
            if too many images are unreadable, or if another process of the run has ended.
    """
    accelerator = start_processes(config)
    with peers_explained(), claimed_folder(config, accelerator):
        run = build(config, accelerator)
        resume_or_start(run)
        display = Display(run)
        with trackers(run), stop_signals(run), display.shown():
            while not is_done(run):
                train_epoch(run, display)
                if not run.status:
                    finish_epoch(run, display)
        write_results(run, run.status)
        accelerator.wait_for_everyone()
        position = run.position
        return RunResult(run.folder, run.status, position.best.get("best"), position.rows, position.bad)


def train_epoch(run: Run, display: Display) -> None:
    """Train from `run.position` to the end of the epoch, or until the processes agree to stop (see `run.status`)."""
    config, position = run.config, run.position
    if position.batch >= run.batches_per_epoch:  # the run was stopped between the last step and validation
        return
    run.task.set_training_mode(run.config, run.forward)
    batches = run.loader.epoch(position.epoch, start_step=position.batch)
    began = time.monotonic()
    while position.batch < run.batches_per_epoch:
        rate = rate_at(config, position.epoch, position.batch / run.batches_per_epoch)
        for group in run.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)  # factor of layer-wise decay or of the head
        decision = step(run, batches)
        position.updates += 1
        began, passed = time.monotonic(), time.monotonic() - began
        position.epoch_seconds += passed
        position.seconds += passed
        display.step(run, log_step(run, rate))
        if decision.stop or decision.timeout:
            run.status = "signal" if decision.stop else "time limit"
            save(run)
            return
        due = config.save_every_steps is not None and position.updates % config.save_every_steps == 0
        if (due or decision.save) and position.batch < run.batches_per_epoch:  # the end of an epoch saves anyway
            save(run)


def step(run: Run, batches: Iterator[Any]) -> Decision:
    """Take an optimiser step over `accumulation` batches. Raises UserError before the update for a non-finite loss."""
    config, position, accelerator = run.config, run.position, run.accelerator
    consistent = position.epoch >= config.distillation_start * config.epochs
    seen: list[tuple[Any, list[Tensor]]] = []
    vote: list[Callable[[], Decision]] = []

    def start_voting(losses: list[Tensor]) -> None:
        vote.append(start_vote(run, [loss for _, earlier in seen for loss in earlier] + losses))

    for index in range(config.accumulation):
        last = index == config.accumulation - 1
        batch = next_batch(run, batches)
        views, targets = send_to_device((batch.views, batch.targets), accelerator.device, non_blocking=True)
        views, targets = run.objective.mix(views, targets, position.epoch, position.batch)
        losses = backward_replicas(
            run.forward,
            views,
            targets,
            run.objective,
            kind=config.distillation if consistent else "none",
            target=config.distillation_target,
            alpha=config.distillation_alpha,
            share=1 / config.accumulation,
            backward=accelerator.backward,
            no_sync=lambda: no_sync(run),
            synchronise=last,
            before_last=start_voting if last else None,
        )
        seen.append((batch, losses))
        record_batch(run, batch, losses)
        position.batch += 1
    decision = vote[0]()
    if decision.not_finite:
        raise UserError(describe_failure(run, seen))
    record_gradients(run, clip_gradients(run))
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.ema is not None:
        run.ema.update(run.model, step=position.updates + 1)
    return decision


def finish_epoch(run: Run, display: Display) -> None:
    """Validate, record the metrics, and write the weights and the training state.

    The weights are written before the state and metrics.csv after it, so a run killed in between redoes the missing
    part when resumed. A state is also saved before validation, so that only validation is repeated if it fails.
    """
    config, position = run.config, run.position
    done = position.epoch + 1
    validates = config.eval_every > 0 and (done % config.eval_every == 0 or done == config.epochs)
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
    position.batch, position.sums = 0, {}
    position.epoch_seconds = position.waited = 0.0
    write_weights(run, row)
    save(run)
    write_results(run, "running")
    log_epoch(run, row)
    display.epoch(run, row)


def validate(run: Run, model: Any, prefix: str) -> dict[str, float]:
    """Return the scores at every training size, preceded by the mean of the main score, which selects the best weights.

    Args:
        prefix: prepended to the name of every score.
    """
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


def is_done(run: Run) -> bool:
    """Return whether the run ends here, and set `run.status` to the reason."""
    config, position = run.config, run.position
    patience = config.early_stop
    if not run.status and position.epoch >= config.epochs:
        run.status = "finished"
    waited = position.epoch - position.best.get("best_epoch", position.epoch)
    if not run.status and patience is not None and waited >= patience:
        run.status = "early stop"
    return bool(run.status)
