"""`anyres demo`, and the demo of every task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from anyres.cli.terminal import print_files, print_sweep, say
from anyres.tasks.base import Task

_DEMO = """

    Takes a few minutes on two CPU cores and downloads nothing. If interrupted, the same command continues.

    Args:
        output: folder for the runs and the report; by default runs/demo or runs/demo_TASK
        epochs: epochs of the multi-resolution run; by default those of its recipe
        seed: random seed
        device: auto, cpu, cuda, …
"""


def demo_command(task: Task) -> Callable[..., None]:
    """Return the `demo` command of a task."""

    def demo(
        *,
        output: str | None = None,
        epochs: Annotated[int | None, Field(ge=1)] = None,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        from anyres.cli.demo import run_demo

        folder = output or (f"runs/demo_{task.name}" if task.group else "runs/demo")
        result = run_demo(task, Path(folder), epochs, seed, device)
        print_sweep(result.rows)
        print()
        say(result.finding.headline)
        print()
        print_files(result.files)

    demo.__doc__ = task.demo.about + _DEMO
    return demo
