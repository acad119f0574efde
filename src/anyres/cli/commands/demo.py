"""`anyres demo`, and the demo of every task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from anyres.cli.terminal import print_files, print_sweep, say
from anyres.tasks.base import Task

_DEMO = """

    Takes minutes on two CPU cores, downloads nothing, and continues where it was if interrupted.

    Args:
        output: folder for the runs, the pictures and the report; otherwise runs/demo and the task
        epochs: epochs of the multi-resolution runs instead of the demo's own number
        seed: seed of everything random
        device: auto, cpu, cuda, …
"""


def demo_command(task: Task) -> Callable[..., None]:
    """The command that shows what the task is about."""

    def demo(*, output: str | None = None, epochs: int | None = None, seed: int = 0, device: str = "auto") -> None:
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
