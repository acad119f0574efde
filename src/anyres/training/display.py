"""Progress on the terminal and numbers for the trackers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anyres.training.records import images_per_second
from anyres.training.run import Run

REFRESH_SECONDS = 0.5


class Display:
    """A bar with images/s and time left on a terminal, and a line per validation; elsewhere a line per epoch."""

    def __init__(self, run: Run) -> None:
        self._loss = math.nan
        self._next = 0.0
        console = Console(stderr=True)
        moves = console.is_terminal and not console.is_dumb_terminal
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]:.0f} images/s  loss {task.fields[loss]:.3f}  left"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,  # its thread would compete with the training on a small machine
            disable=not (moves and run.config.progress and run.accelerator.is_main_process),
            speed_estimate_period=120,
        )
        self._speaks = run.config.progress and run.accelerator.is_main_process
        total = run.batches_per_epoch // run.config.accumulation * run.config.epochs
        self._task = self._bar.add_task("", total=total, epoch="", speed=0.0, loss=math.nan)

    @contextmanager
    def shown(self) -> Iterator[None]:
        with self._bar:
            yield

    def step(self, run: Run, rate: float) -> None:
        """After every step. Reads losses from the device (this process's) only every `log_every` steps."""
        position, now = run.position, time.monotonic()
        speed = images_per_second(run)
        if position.updates % run.config.log_every == 0:
            losses = {f"train/{name}": float(total) / count for name, (total, count) in position.sums.items()}
            self._loss = sum(losses.values()) / len(losses)
            run.accelerator.log({**losses, "train/lr": rate, "train/images_per_second": speed}, step=position.updates)
        if not self._bar.disable and now >= self._next:
            self._next = now + REFRESH_SECONDS
            fields: dict[str, Any] = {
                "epoch": f"{position.epoch + 1}/{run.config.epochs}",
                "speed": speed,
                "loss": self._loss,
            }
            self._bar.update(self._task, completed=position.updates, refresh=True, **fields)

    def epoch(self, run: Run, row: dict[str, Any]) -> None:
        """After every epoch, with its row of metrics.csv."""
        run.accelerator.log({f"epoch/{name}": value for name, value in row.items()}, step=run.position.updates)
        score = run.task.score
        if self._speaks and (self._bar.disable or score in row):  # the bar shows the epochs in between
            parts = [f"epoch {row['epoch']}/{run.config.epochs}", f"loss {row['loss']:.4f}"]
            parts += [f"{name} {value:.2f}" for name, value in row.items() if name.startswith((score, f"ema_{score}"))]
            parts.append(f"{row['images_per_second']:.0f} images/s")
            self._bar.console.print("  ".join(parts), markup=False, emoji=False, highlight=False, soft_wrap=True)
