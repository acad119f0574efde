"""The demo of every task: train on built-in data and compare multi-resolution training with a baseline at all sizes."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyres.allocator import keep_memory
from anyres.errors import UserError
from anyres.extras import require
from anyres.tasks import TASKS
from anyres.tasks.base import Task
from anyres.training import load_config

if TYPE_CHECKING:
    from anyres.evaluation import SweepResult
    from anyres.training.config import RunConfig


PICTURES = 6
"""Number of items whose predictions are drawn, for tasks that draw their results."""


def run_demo(task: Task, output: Path, epochs: int | None = None, seed: int = 0, device: str = "auto") -> SweepResult:
    """Train the networks of `task.demo`, evaluate them at its sizes and write the report to `output / "report"`.

    `epochs` replaces the number of epochs of the first recipe and scales those of the others and the warm-up in
    proportion. Finished runs in `output` are not trained again.

    Raises:
        UserError: if a required package is missing, or if a run is stopped or its process is killed.
    """
    demo = task.demo
    for package in task.packages:
        require(package)
    runs = demo.runs
    configs = []
    first = load_config(next(iter(runs.values())), task.name)
    for recipe in runs.values():
        options: dict[str, Any] = {"output": str(output / recipe), "seed": seed, "device": device, "progress": False}
        if epochs is not None:
            usual = load_config(recipe, task.name)
            options["epochs"] = max(1, round(epochs * usual.epochs / first.epochs))
            options["warmup_epochs"] = usual.warmup_epochs * options["epochs"] / usual.epochs
        configs.append(load_config(recipe, task.name, **options))
    print(f"[1/2] training {len(configs)} networks side by side: {', '.join(runs)}", file=sys.stderr, flush=True)
    # Networks this small do not benefit from a second core. A process for each saves a third of the time.
    threads = max(1, (os.cpu_count() or 1) // len(configs))
    with ProcessPoolExecutor(len(configs), _processes()) as pool, _ended_together():
        scores = pool.map(_train, configs, [threads] * len(configs))
        # These imports take seconds, so do them while the networks train.
        import torch

        from anyres.evaluation import sweep
        from anyres.evaluation.evaluate import open_test_source
        from anyres.evaluation.sweep import check_output
        from anyres.tasks import load_pretrained

        check_output(output / "report")
        for name, score in zip(runs, scores, strict=True):
            print(f"      {name}: {score:.1f} % at its training sizes", file=sys.stderr, flush=True)
    # Use the averaged weights of the last epoch: choosing the best epoch would mean selecting on the test images.
    models = {name: load_pretrained(output / recipe / "last_ema") for name, recipe in runs.items()}
    model = next(iter(models.values()))
    print(f"[2/2] evaluating at {len(demo.sizes)} sizes", file=sys.stderr, flush=True)
    source = open_test_source(model, "digits")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in training; threads that wait for each other are far slower on a busy machine
    try:
        result = sweep(
            models,
            source,
            demo.sizes,
            output / "report",
            batch_size=demo.batch_size,
            cost_seconds=0.05,
            command=" ".join(filter(None, ["anyres", task.group, "demo"])),
        )
    finally:
        torch.set_num_threads(before)
    if task.draws:
        from anyres.inference.files import draw_results
        from anyres.inference.predictor import Predictor

        folder = output / "pictures"
        items = [source.item(index) for index in range(min(PICTURES, len(source)))]
        list(draw_results(Predictor(model, first.shapes[0], source=source), items, folder))
        result.files["pictures"] = folder
    return result


@contextmanager
def _ended_together() -> Iterator[None]:
    """Terminate all training processes if one of them, or this process, fails or is interrupted."""
    others = multiprocessing.active_children()
    try:
        yield
    except BaseException as error:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a training process has ended (killed or out of memory); the same command continues its run"
            ) from error
        raise


def _processes() -> multiprocessing.context.BaseContext:
    """Return a context whose processes share one slow import of torch if the platform can fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["anyres.training.loop"])
    return context


def _train(config: RunConfig, threads: int) -> float:
    """Train in a separate process and return the final score of the averaged weights."""
    import torch

    from anyres.training import train

    keep_memory()
    torch.set_num_threads(threads)
    result = train(config)
    if result.status != "finished":
        raise UserError(f"the run in {result.folder} was stopped ({result.status}); the same command continues it")
    return float(result.rows[-1][f"ema_{TASKS[config.task].score}"])
