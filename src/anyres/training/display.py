"""Progress on the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anyres.training.records import data_wait, images_per_second
from anyres.training.run import Run

REFRESH_SECONDS = 0.5


class Display:
    """On a terminal, a bar with images/s and time left and a line per validation; elsewhere, a line per epoch."""

    def __init__(self, run: Run) -> None:
        self._loss = math.nan
        self._next = 0.0
        console = Console(stderr=True)
        moves = console.is_terminal and not console.is_dumb_terminal
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]:.0f} images/s"),
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
        with self._bar:
            yield

    def step(self, run: Run, entry: dict[str, float] | None) -> None:
        """Update the bar after a step; `entry` is the step's log entry, or None if the step was not logged."""
        position, now = run.position, time.monotonic()
        if entry is not None:
            self._loss = entry["loss"]
        if not self._bar.disable and now >= self._next:
            self._next = now + REFRESH_SECONDS
            fields: dict[str, Any] = {
                "epoch": f"{position.epoch + 1}/{run.config.epochs}",
                "speed": images_per_second(run),
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
            parts += [f"{row['images_per_second']:.0f} images/s", f"data wait {row['data_wait']:.0%}"]
            parts += [f"gradient norm {row['grad_norm']:.3g}"] if "grad_norm" in row else []
            parts += [f"peak {value:.2f} GiB" for name, value in row.items() if name.startswith("peak_")]
            self._bar.console.print("  ".join(parts), markup=False, emoji=False, highlight=False, soft_wrap=True)
