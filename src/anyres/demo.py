"""The main result on built-in data: one checkpoint that holds its accuracy at every size, beside one that does not."""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyres.training import load_config

if TYPE_CHECKING:
    from anyres.evaluation import SweepResult

RUNS = {
    "ResFormer": "digits",
    "ResFormer, rlpe": "digits_rlpe",
    "DeiT": "digits_deit",
}
"""Name in the pictures → recipe."""

SIZES = [(side, side) for side in (10, 12, 15, 20, 24, 28, 32, 40, 48, 64, 96)] + [(24, 30), (40, 32)]
"""Half the smallest to three times the largest training size, and two shapes that are not square."""


def run_demo(
    output: Path, epochs: int | None = None, seed: int = 0, device: str = "auto", rotary: bool = True
) -> SweepResult:
    """Train the networks of `RUNS` under `output`, evaluate all at `SIZES`, write the report into `output / "report"`.

    `epochs` replaces the recipes' number; the comparison keeps as many image views as the multi-resolution runs have.
    Runs that are finished already are not trained again.
    """
    runs = {name: recipe for name, recipe in RUNS.items() if rotary or recipe != "digits_rlpe"}
    jobs = []
    for recipe in runs.values():
        options: dict[str, Any] = {"output": str(output / recipe), "seed": seed, "device": device, "progress": False}
        if epochs is not None:
            views = len(load_config("digits").sizes) // len(load_config(recipe).sizes)
            options["epochs"] = epochs * views
        jobs.append((recipe, options))
    print(f"[1/2] training {len(jobs)} networks side by side: {', '.join(runs)}", file=sys.stderr, flush=True)
    # Networks this small gain nothing from a second core, so each gets a process of its own: a third less time.
    threads = max(1, (os.cpu_count() or 1) // len(jobs))
    with ProcessPoolExecutor(len(jobs), _processes()) as pool:
        scores = pool.map(_train, jobs, [threads] * len(jobs))
        # Loaded while the networks train: it takes seconds.
        from anyres.data import open_source
        from anyres.evaluation import sweep
        from anyres.tasks import load_pretrained

        for name, score in zip(runs, scores, strict=True):
            print(f"      {name}: {score:.1f} % at its training sizes", file=sys.stderr, flush=True)
    # The last weights, averaged over the run: choosing the best epoch would be choosing on the test images.
    models = {name: load_pretrained(output / recipe / "last_ema") for name, recipe in runs.items()}
    print(f"[2/2] evaluating at {len(SIZES)} sizes", file=sys.stderr, flush=True)
    return sweep(
        models,
        open_source("digits", "val"),
        SIZES,
        output / "report",
        batch_size=120,
        cost_seconds=0.05,
        command="anyres demo",
    )


def _processes() -> multiprocessing.context.BaseContext:
    """Processes that share one import of torch where the platform can fork, since it takes seconds, too."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    # glibc would hand the activations' memory back to the system after every step: 13 % of the time on the machine
    # this was tried on. It reads these when a process starts; others ignore them.
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        os.environ.setdefault(name, str(1 << 32))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["anyres.training.loop"])
    return context


def _train(job: tuple[str, dict[str, Any]], threads: int) -> float:
    """Train a recipe in a process of its own; the final accuracy of the averaged weights."""
    import torch

    from anyres.training import train

    torch.set_num_threads(threads)
    recipe, options = job
    result = train(load_config(recipe, **options))
    return float(result.rows[-1]["ema_acc1"])
