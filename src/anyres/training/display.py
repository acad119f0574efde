"""Progress on the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anyres.training.records import data_wait, shape_name, views_per_second
from anyres.training.run import Run

REFRESH_SECONDS = 0.5
LINE_SECONDS = (10.0, 60.0)
"""Without a bar, a line is printed this long after the start, and this often after that."""


class Display:
    """Progress of a run.

    On a terminal it is a bar with views/s and time left and a line per validation. Elsewhere it is a line about the run
    at its start, one per epoch, and some within long epochs.
    """

    def __init__(self, run: Run) -> None:
        self._loss = math.nan
        self._next = 0.0
        self._run = run
        console = Console(stderr=True)
        moves = console.is_terminal and not console.is_dumb_terminal
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]:.0f} views/s"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("data wait {task.fields[wait]:.0%}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,  # the refresh thread would compete with training on a small machine
            disable=not (moves and run.config.progress and run.accelerator.is_main_process),
            speed_estimate_period=120,
        )
        self._speaks = run.config.progress and run.accelerator.is_main_process
        total = run.batches_per_epoch // run.config.accumulation * run.config.epochs
        self._task = self._bar.add_task("", total=total, epoch="", speed=0.0, wait=0.0, loss=math.nan)

    @contextmanager
    def shown(self) -> Iterator[None]:
        if self._speaks and self._bar.disable:
            self._print(_introduction(self._run))
            self._next = time.monotonic() + LINE_SECONDS[0]
        with self._bar:
            yield

    def step(self, run: Run, entry: dict[str, float] | None) -> None:
        """Update the bar after a step; `entry` is the step's log entry, or None if the step was not logged."""
        position, now = run.position, time.monotonic()
        if entry is not None:
            self._loss = entry["loss"]
        if now < self._next:
            return
        if self._bar.disable:
            self._next = now + LINE_SECONDS[1]
            if self._speaks and position.batch < run.batches_per_epoch:  # the end of an epoch has a line of its own
                place = (
                    f"epoch {position.epoch + 1}/{run.config.epochs}, batch {position.batch}/{run.batches_per_epoch}"
                )
                self._print(f"{place}  {views_per_second(run):.0f} views/s  data wait {data_wait(run):.0%}")
        else:
            self._next = now + REFRESH_SECONDS
            fields: dict[str, Any] = {
                "epoch": f"{position.epoch + 1}/{run.config.epochs}",
                "speed": views_per_second(run),
                "wait": data_wait(run),
                "loss": self._loss,
            }
            self._bar.update(self._task, completed=position.updates, refresh=True, **fields)

    def epoch(self, run: Run, row: dict[str, Any]) -> None:
        """Print a line after an epoch; `row` is the epoch's row of metrics.csv."""
        score = run.task.score
        if self._speaks and (self._bar.disable or score in row):  # epochs without validation show only in the bar
            parts = [f"epoch {row['epoch']}/{run.config.epochs}", f"loss {row['loss']:.4f}"]
            parts += [f"{name} {value:.2f}" for name, value in row.items() if name.startswith((score, f"ema_{score}"))]
            parts += [f"{row['views_per_second']:.0f} views/s", f"data wait {row['data_wait']:.0%}"]
            parts += [f"gradient norm {row['grad_norm']:.3g}"] if "grad_norm" in row else []
            parts += [f"peak {value:.2f} GiB" for name, value in row.items() if name.startswith("peak_")]
            self._print("  ".join(parts))

    def _print(self, line: str) -> None:
        self._bar.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _introduction(run: Run) -> str:
    config = run.config
    parameters = sum(parameter.numel() for parameter in run.plain.parameters()) / 1e6
    images = run.batches_per_epoch * (config.batch_size // config.accumulation)
    sizes = ", ".join(map(shape_name, config.shapes))
    return (
        f"training {config.model} ({parameters:.2f} M parameters) at {sizes}: {config.epochs} epochs of {images} images"
        f" in {run.batches_per_epoch} batches, into {run.folder}"
    )
