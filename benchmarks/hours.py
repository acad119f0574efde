"""Expected hours of a training run on the machine at hand: times a few optimiser steps and multiplies by their number.

Takes the words of the command that would train, after `anyres`; options before them are the script's own:

uv run python benchmarks/hours.py train recipe=resformer_small data=/data/imagenet
torchrun --nproc-per-node 8 benchmarks/hours.py --timed 50 segment train recipe=resformer_upernet data=/data/ade20k
uv run python benchmarks/hours.py --images 1281167 train recipe=resformer_small data=digits    # without the data

Reading the images counts, unless the data are built-in stand-ins; validation does not. Nothing is written. `--images`
is how many training images there would be; otherwise those of `data`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
from timing import machine

from anyres.cli.arguments import parse
from anyres.cli.commands import COMMANDS
from anyres.data import Item, MapSource
from anyres.errors import UserError
from anyres.tasks import TASKS
from anyres.training import load_config
from anyres.training.config import RunConfig
from anyres.training.loop import step
from anyres.training.processes import start_processes
from anyres.training.setup import build, build_loader

WARM_UP = 3


class Counted(MapSource):
    """A data set of which nothing is known but the number of its images."""

    def __init__(self, images: int) -> None:
        super().__init__("training images", ["first", "second"])
        self.images = images

    def __len__(self) -> int:
        return self.images

    def _item(self, index: int) -> Item:
        raise NotImplementedError("only counted")


def config_of_command(words: Sequence[str]) -> RunConfig:
    """The options of a run from the words of its command after `anyres`. Raises UserError as the command does."""
    trains = {tuple(filter(None, (task.group, "train"))): name for name, task in TASKS.items()}
    task = next((name for path, name in trains.items() if tuple(words[: len(path)]) == path), None)
    if task is None:
        raise UserError(f"{' '.join(words)!r} trains nothing: give the words of a training command, such as train …")
    _, values = parse("anyres", "", COMMANDS, list(words))
    given = {name: value for name, value in values.items() if value is not None}
    config: RunConfig = load_config(given.pop("recipe", None), task, **given)
    return config


def count_steps(config: RunConfig, images: int) -> int:
    """Optimiser steps of a whole run on so many training images."""
    process: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    views: Any = None  # nothing is read
    loader = build_loader(config, process, Counted(images), views)
    return config.epochs * (loader.steps_per_epoch // config.accumulation)


def time_steps(config: RunConfig, timed: int) -> tuple[list[float], Any]:
    """Seconds of each of `timed` optimiser steps after a few that do not count, and the run they were taken in."""
    accelerator = start_processes(config)
    run = build(config, accelerator)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0  # the peak rate without its warm-up may make the loss infinite
    run.task.set_training_mode(config, run.forward)
    batches = endless(run)
    times = []
    for _ in range(WARM_UP + timed):
        began = time.perf_counter()
        step(run, batches)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times[WARM_UP:], run


def endless(run: Any) -> Iterator[Any]:
    for epoch in count():
        yield from run.loader.epoch(epoch)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timed", type=int, default=20, help="steps to time")
    parser.add_argument("--images", type=int, help="training images, if `data` are others than those of the run")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="words after `anyres`")
    options = parser.parse_args(words)
    config = config_of_command(options.command)
    times, run = time_steps(config, options.timed)
    if not run.accelerator.is_main_process:
        return
    steps = count_steps(config, options.images or run.loader.epoch_size)
    seconds, devices = statistics.mean(times), run.accelerator.num_processes
    hours = seconds * steps / 3600
    kind = "GPU" if run.accelerator.device.type == "cuda" else run.accelerator.device.type.upper()
    print(machine(run.accelerator.device))
    print(f"{config.model}: {steps:,} steps of {config.batch_size} in {config.epochs} epochs")
    print(f"{seconds:.3f} s a step (mean of {len(times)}, {min(times):.3f} to {max(times):.3f}) on {devices} x {kind}")
    print(f"{hours:,.1f} hours, {hours * devices:,.1f} {kind} hours, without validation")


if __name__ == "__main__":
    main()
