"""`anyres sweep`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Collection
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from anyres.cli.commands.values import present_device
from anyres.cli.paths import check_data, check_models, members
from anyres.cli.terminal import (
    note,
    print_files,
    print_sweep,
    say,
    show_progress,
)
from anyres.errors import UserError


def sweep(
    models: list[str],
    *,
    data: str = "digits",
    split: Literal["val", "train", "all"] = "val",
    sizes: str = "96:640:32",
    aspect: str = "1:1",
    names: str | None = None,
    bit_depth: int | None = None,
    weights: Literal["best", "last", "best_ema", "last_ema"] = "best",
    images: Annotated[int | None, Field(ge=1)] = None,
    output: str = "runs/sweep",
    batch_size: Annotated[int | None, Field(ge=1)] = None,
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    workers: int = 0,
    cost: bool = True,
) -> None:
    """Evaluate one or several models at many sizes and aspect ratios, and write a table, plots and a report.

    All models must be for the same task. The score is top-1 for image and video classification, mIoU for segmentation
    and AP for detection. For segmentation and detection, a size is the short side of the image. For classification,
    images are resized (bicubic) so that the short side is int(size/crop_pct), then centre-cropped; for a non-square
    size, the resized image covers (height/crop_pct, width/crop_pct).

    Args:
        models: runs, saved models, published weights files, model names, timm:NAME; LABEL:=MODEL sets the label, and
            RUN+RUN+RUN (such as seeds) counts as one model: the mean of the runs, with their range
        data: digits, an image folder, hf:NAME, hf-stream:NAME or wds:PATTERN, or other data of the task as in training
        split: split of the data
        sizes: sides and HEIGHTxWIDTH, with ranges FIRST:LAST:STEP, such as 96:640:32,224x320
        names: file with the models' class names, one per line, to use instead of their own
        bit_depth: bits per channel of images with more than 8 bits, if the files do not say: 12, or 16 for dark images
        weights: which weights of runs: of the best validation, the last ones, or the moving average of either, which is
            also taken from weights files that have one
        images: number of images, evenly spread over the classes; by default all
        aspect: ratios WIDTH:HEIGHT at which to evaluate every square size, with the same area
        output: folder for sweep.csv, sweep.png, pareto.png and report.html; within a run's folder, the run's model card
            gets the table as well
        batch_size: items per batch; by default 64 images, 8 clips, or 1 image for segmentation and detection
        device: auto, cpu, cuda, …
        precision: precision of autocast
        workers: number of processes that decode images
        cost: also measure images/s, GFLOPs and peak memory
    """
    check_models(models)
    check_data(data)
    from anyres.data import parse_sizes
    from anyres.evaluation import parse_aspects, sizes_at_aspects
    from anyres.evaluation import sweep as run
    from anyres.evaluation.evaluate import open_test_source
    from anyres.evaluation.results import card_table
    from anyres.evaluation.sweep import check_output
    from anyres.inference.modelspec import open_model, published_top1, weights_folder
    from anyres.io.hub import add_sweep
    from anyres.tasks import task_of

    device = present_device(device)
    check_output(output)
    wanted = parse_sizes(sizes)
    squares = [height for height, width in wanted if height == width]
    wanted += sizes_at_aspects(squares, parse_aspects(aspect))
    shapes = list(dict.fromkeys(wanted))
    opened: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    specs: dict[str, str] = {}
    for spec in models:
        group, parts = members(spec)
        found = [open_model(part, names, weights) for part in parts]
        own: list[str] = []
        for part, (name, model) in zip(parts, found, strict=True):
            label = _unused(f"{group}: {name}" if len(parts) > 1 and group else group or name, opened)
            opened[label], specs[label] = model, part
            own.append(label)
        if len(own) > 1:
            groups[_unused(group or " + ".join(name for name, _ in found), [*opened, *groups])] = own
    tasks = {task_of(model).name: name for name, model in opened.items()}
    if len(tasks) > 1:
        pairs = ", ".join(f"{name} ({task})" for task, name in tasks.items())
        raise UserError(f"{pairs} are for different tasks; sweep the models of one task at a time.")
    first, *others = opened.values()
    source = open_test_source(first, data, split, others=others, bit_depth=bit_depth)
    result = run(
        opened,
        source,
        shapes,
        output,
        batch_size=batch_size or task_of(first).test_batch_size,
        device=device,
        precision=precision,
        workers=workers,
        images=images,
        groups=groups,
        cost=cost,
        facts={"Weights": f"{weights}, of run folders"} if any(map(os.path.isdir, specs.values())) else {},
        published={name: published_top1(specs[name], model, len(source.label_names)) for name, model in opened.items()},
        command=shlex.join(["anyres", *sys.argv[1:]]),
        progress=show_progress,
    )
    for label, spec in specs.items():
        folders = weights_folder(spec, weights)
        if folders and Path(output).absolute().is_relative_to(folders[0]):  # the run's own sweep
            about, table = card_table([row for row in result.rows if row.model == label], source.name)
            if not add_sweep(folders[1], about, table):
                note(f"{folders[1]} keeps its model card: somebody edited it.")
    print_sweep(result.shown)
    say(result.finding.headline)
    print_files(result.files)


def _unused(name: str, taken: Collection[str]) -> str:
    """The name, or if it is taken with the first number that makes it another."""
    tries = (name if number == 1 else f"{name} #{number}" for number in count(1))
    return next(each for each in tries if each not in taken)
