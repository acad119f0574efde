"""`anyres demo`, and the demo of every task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from anyres.cli.terminal import (
    print_files,
    print_sweep,
    say,
)

_DEMO = """

    Takes minutes on two CPU cores, downloads nothing, and continues where it was if interrupted.

    Args:
        output: folder for the runs, the pictures and the report; otherwise runs/demo and the task
        epochs: epochs of the multi-resolution runs instead of the demo's own number
        seed: seed of everything random
        device: auto, cpu, cuda, …
"""


def _demo_command(task: str, about: str) -> Callable[..., None]:
    def demo(*, output: str | None = None, epochs: int | None = None, seed: int = 0, device: str = "auto") -> None:
        from anyres.cli.demo import run_demo

        folder = output or ("runs/demo" if task == "classification" else f"runs/demo_{task}")
        result = run_demo(task, Path(folder), epochs, seed, device)
        print_sweep(result.rows)
        print()
        say(result.finding.headline)
        print()
        print_files(result.files)

    demo.__doc__ = about + _DEMO
    return demo


demo = _demo_command(
    "classification",
    "Train a multi-resolution ResFormer and an ordinary DeiT on built-in digits, and compare them at many sizes.",
)


segment_demo = _demo_command(
    "segmentation",
    "Train a multi-resolution ResFormer and an ordinary DeiT to segment composed scenes, and compare at many sizes.",
)


detect_demo = _demo_command(
    "detection",
    "Train a detector at three sizes and one at a single size on composed scenes, and compare them at many sizes.",
)


video_demo = _demo_command(
    "video",
    "Train a multi-resolution ResFormer and an ordinary DeiT to tell how digits move, and compare them at many sizes.",
)
