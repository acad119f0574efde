"""The main result of every task on built-in data: one checkpoint that holds its score at every size, beside one that
does not."""

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

from anyres.errors import UserError
from anyres.extras import require
from anyres.tasks import TASKS
from anyres.tasks.base import Task
from anyres.training import load_config

if TYPE_CHECKING:
    from anyres.evaluation import SweepResult
    from anyres.training.config import RunConfig


PICTURES = 6
"""Items whose predictions are drawn, of tasks other than classification."""


def run_demo(task: Task, output: Path, epochs: int | None = None, seed: int = 0, device: str = "auto") -> SweepResult:
    """Train the networks of `task.demo` under `output`, evaluate all at its sizes, write the report into `output /
    "report"`.

    `epochs` replaces the first recipe's number, and those of the others in proportion. Runs that are finished already
    are not trained again.
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
            options["epochs"] = round(epochs * load_config(recipe, task.name).epochs / first.epochs)
        configs.append(load_config(recipe, task.name, **options))
    print(f"[1/2] training {len(configs)} networks side by side: {', '.join(runs)}", file=sys.stderr, flush=True)
    # Networks this small gain nothing from a second core, so each gets a process of its own: a third less time.
    threads = max(1, (os.cpu_count() or 1) // len(configs))
    with ProcessPoolExecutor(len(configs), _processes()) as pool, _ended_together():
        scores = pool.map(_train, configs, [threads] * len(configs))
        # Loaded while the networks train: it takes seconds.
        import torch

        from anyres.evaluation import sweep
        from anyres.evaluation.evaluate import open_test_source
        from anyres.evaluation.sweep import check_output
        from anyres.tasks import load_pretrained

        check_output(output / "report")
        for name, score in zip(runs, scores, strict=True):
            print(f"      {name}: {score:.1f} % at its training sizes", file=sys.stderr, flush=True)
    # The last weights, averaged over the run: choosing the best epoch would be choosing on the test images.
    models = {name: load_pretrained(output / recipe / "last_ema") for name, recipe in runs.items()}
    model = next(iter(models.values()))
    print(f"[2/2] evaluating at {len(demo.sizes)} sizes", file=sys.stderr, flush=True)
    source = open_test_source(model, "digits")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in training; two threads that wait for each other are far slower on a busy machine
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
    """When one of the processes that train or this one fails or is interrupted, let none train on."""
    others = multiprocessing.active_children()
    try:
        yield
    except BaseException as error:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a process that trained has ended (killed, or out of memory); the same command continues its run"
            ) from error
        raise


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


def _train(config: RunConfig, threads: int) -> float:
    """Train in a process of its own; the final score of the averaged weights."""
    import torch

    from anyres.training import train

    torch.set_num_threads(threads)
    result = train(config)
    if result.status != "finished":
        raise UserError(f"the run in {result.folder} was stopped ({result.status}); the same command continues it")
    return float(result.rows[-1][f"ema_{TASKS[config.task].score}"])
