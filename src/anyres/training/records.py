"""The records of a run: metrics.csv, summary.json, the weights and the metrics sent to trackers."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import accelerate
import timm
import torch
from accelerate.utils import gather_object
from torch import Tensor

from anyres.training import state
from anyres.training.processes import precision_of
from anyres.training.run import Run

FLOAT64 = ("cpu", "cuda")
"""Device types that support float64."""

Sums = dict[str, tuple[float, int]]
"""Name -> (sum, count)."""


def next_batch(run: Run, batches: Iterator[Any]) -> Any:
    """Return the next batch and record how long the loop waited for it (a GPU may have been busy in the meantime)."""
    began = time.monotonic()
    batch = next(batches)
    run.position.waited += time.monotonic() - began
    return batch


def record_batch(run: Run, batch: Any, losses: list[Tensor]) -> None:
    """Add a batch's losses and unreadable images to the epoch's metrics."""
    for size, loss in zip(batch.sizes, losses, strict=True):
        add(run, f"loss_{shape_name(size)}", loss)
    run.position.bad |= {bad.name: bad.reason for bad in batch.bad}


def record_gradients(run: Run, norm: Tensor) -> None:
    """Add a step's gradient norm to the epoch's metrics, unless it is infinite: float16 training skips such a step."""
    run.grad_norm = norm
    add(run, "grad_norm", torch.where(norm.isfinite(), norm, 0))
    add(run, "finite_steps", norm.isfinite())


def add(run: Run, name: str, value: Tensor) -> None:
    """Add a scalar to one of the epoch's sums without waiting for the device."""
    sums = run.position.sums
    if name not in sums:
        wide = torch.float64 if value.device.type in FLOAT64 else torch.float32
        sums[name] = [torch.zeros((), dtype=wide, device=value.device), 0]
    sums[name][0] += value
    sums[name][1] += 1


def epoch_row(run: Run) -> dict[str, Any]:
    """Return the epoch's row of metrics.csv over all processes; data wait and memory are the largest of any process."""
    position = run.position
    shares = gather_object([(read_sums(run), position.bad, {"data_wait": data_wait(run), **peak_memory(run)})])
    totals: Sums = {}
    most: dict[str, float] = {}
    for sums, bad, costs in shares:
        position.bad |= bad
        for name, (total, count) in sums.items():
            before = totals.get(name, (0.0, 0))
            totals[name] = (before[0] + total, before[1] + count)
        for name, cost in costs.items():
            most[name] = max(most.get(name, 0.0), round(cost, 3))
    finite, _ = totals.get("finite_steps", (0, 0))  # missing in states of version 0.1
    return {
        "epoch": position.epoch + 1,
        "updates": position.updates,
        "lr": max(group["lr"] for group in run.optimizer.param_groups),
        **mean_losses(run, totals),
        **({"grad_norm": totals["grad_norm"][0] / finite} if finite else {}),
        "images_per_second": round(images_per_second(run), 1),
        "views_per_second": round(views_per_second(run), 1),
        **most,
        "seconds": round(position.seconds, 1),
        "bad_images": len(position.bad),
    }


def read_sums(run: Run) -> Sums:
    """Copy this process's sums of the epoch from the device."""
    return {name: (float(total), count) for name, (total, count) in run.position.sums.items()}


def mean_losses(run: Run, sums: Sums) -> dict[str, float]:
    """Return the mean loss, overall and for every training size that occurred."""
    names = [f"loss_{shape_name(shape)}" for shape in run.config.shapes]
    losses = {name: sums[name] for name in names if name in sums}
    mean = sum(total for total, _ in losses.values()) / sum(count for _, count in losses.values())
    return {"loss": mean, **{name: total / count for name, (total, count) in losses.items()}}


def images_per_second(run: Run) -> float:
    """Return images per second in the current epoch over all processes, counting each image once, not once per size."""
    images = run.position.batch * (run.config.batch_size // run.config.accumulation)
    return images / max(run.position.epoch_seconds, 1e-9)


def views_per_second(run: Run) -> float:
    """Return views per second in the current epoch over all processes: an image counts once for every size it is shown
    at."""
    names = [f"loss_{shape_name(shape)}" for shape in run.config.shapes]
    batches = sum(run.position.sums[name][1] for name in names if name in run.position.sums)
    return batches * (run.config.batch_size // run.config.accumulation) / max(run.position.epoch_seconds, 1e-9)


def data_wait(run: Run) -> float:
    """Return the fraction (0 to 1) of the current epoch's time that was spent waiting for data."""
    return run.position.waited / max(run.position.epoch_seconds, 1e-9)


def peak_memory(run: Run) -> dict[str, float]:
    """Return the peak memory since the process started, in GiB.

    On CUDA devices this is the memory allocated by torch. On other devices it is the resident set size of the process
    (on Linux, that of the program that launched it if larger).
    """
    device = run.accelerator.device
    if device.type == "cuda":
        return {"peak_allocated_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def write_weights(run: Run, row: dict[str, Any]) -> None:
    """Write last/ and, if the score improved, best/; likewise last_ema/ and best_ema/ for the moving average."""
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


def write_results(run: Run, status: str) -> None:
    """Write metrics.csv and summary.json."""
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


def describe_failure(run: Run, seen: list[tuple[Any, list[Tensor]]]) -> str:
    """Return an error message about the batch whose loss is not finite, with the names of its images."""
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


def shape_name(shape: Any) -> str:
    """Format a size as "224" if it is square, otherwise as "160x256" (height x width)."""
    height, width = shape
    return str(height) if height == width else f"{height}x{width}"


@contextmanager
def trackers(run: Run) -> Iterator[None]:
    """Open TensorBoard and, if requested, Weights & Biases and trackio; a resumed run continues their curves."""
    name = run.folder.resolve().name
    options = run.config.to_dict()
    resumed = {"config": options, "resume": "allow"}
    accelerator = run.accelerator
    with ExitStack() as ended:
        ended.callback(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = _not_about_files
        ended.callback(lambda: accelerator.trackers.clear())  # init_trackers replaces the list
        accelerator.init_trackers(
            "anyres",
            init_kwargs={
                "tensorboard": {"purge_step": run.position.updates},  # hide entries logged after the saved state
                "wandb": {"name": name, "dir": str(run.folder), "id": run.position.run_id, **resumed},
                "trackio": {"name": f"{name}-{run.position.run_id}", **resumed},
            },
        )
        for tracker in accelerator.trackers:  # not end_training, which also closes the process group
            ended.callback(tracker.finish)
        yield


def _not_about_files(arguments: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, except for a file that it cannot write.

    TensorBoard writes in a thread; its next call in the main thread raises the same error, which then ends the run.
    """
    if not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)


def log_step(run: Run, rate: float) -> dict[str, float] | None:
    """Log this process's metrics every `log_every` steps and return them; return None after all other steps.

    The gradient norm is that of the step; the other metrics cover the epoch so far. Nothing is read from the device
    after steps that are not logged.
    """
    if run.position.updates % run.config.log_every:
        return None
    entry = {
        **mean_losses(run, read_sums(run)),
        "lr": rate,
        "grad_norm": float(run.grad_norm),
        "images_per_second": images_per_second(run),
        "views_per_second": views_per_second(run),
        "data_wait": data_wait(run),
        **peak_memory(run),
    }
    run.accelerator.log({f"train/{name}": value for name, value in entry.items()}, step=run.position.updates)
    return entry


def log_epoch(run: Run, row: dict[str, Any]) -> None:
    """Send a row of metrics.csv to the trackers."""
    run.accelerator.log({f"epoch/{name}": value for name, value in row.items()}, step=run.position.updates)
