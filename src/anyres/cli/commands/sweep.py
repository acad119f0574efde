"""`anyres sweep`."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any, Literal

from pydantic import Field

from anyres.cli.commands.values import Device
from anyres.cli.terminal import (
    print_files,
    print_sweep,
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
    output: str = "runs/sweep",
    batch_size: Annotated[int | None, Field(ge=1)] = None,
    device: Device = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    workers: int = 0,
    cost: bool = True,
) -> None:
    """Evaluate one or several models at many sizes and aspect ratios; write a table, pictures and a report.

    Models of any task, but of one: top-1 of classifiers and of clips, mIoU of segmentation, AP of detection. A size is
    the short side of the image in segmentation and detection. For classification images are resized (bicubic) so that
    the short side is int(size/crop_pct), then the centre is cropped; for a size that is not square the resized image
    covers the box (height/crop_pct, width/crop_pct).

    Args:
        models: runs, saved models, published weights files, names, timm:NAME; LABEL:=MODEL gives a label of your own
        data: digits, an image folder, hf:NAME, hf-stream:NAME or wds:PATTERN, or what the task's training takes
        split: part of the data
        sizes: sides and HEIGHTxWIDTH, with ranges FIRST:LAST:STEP, such as 96:640:32,224x320
        names: file of the models' class names, one on a line, instead of those that they come with
        bit_depth: bits of pictures of more than 8 bits, where the files do not say: 12, or 16 for dark ones
        aspect: ratios WIDTH:HEIGHT at which every square size is evaluated, at the same area
        output: folder of sweep.csv, sweep.png, pareto.png and report.html
        batch_size: images per pass; otherwise 64, of clips 8, in segmentation and detection 1
        device: auto, cpu, cuda, …
        precision: of the arithmetic, under autocast
        workers: processes that decode images
        cost: also measure images/s, GFLOPs and peak memory
    """
    from anyres.data import parse_sizes
    from anyres.evaluation import parse_aspects, sizes_at_aspects
    from anyres.evaluation import sweep as run
    from anyres.evaluation.evaluate import open_test_source
    from anyres.evaluation.sweep import check_output
    from anyres.inference.modelspec import open_model
    from anyres.tasks import task_of

    check_output(output)
    wanted = parse_sizes(sizes)
    squares = [height for height, width in wanted if height == width]
    wanted += sizes_at_aspects(squares, parse_aspects(aspect))
    shapes = list(dict.fromkeys(wanted))
    opened: dict[str, Any] = {}
    for spec in models:
        name, model = open_model(spec, names)
        while name in opened:
            name += "'"
        opened[name] = model
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
        cost=cost,
        command=shlex.join(["anyres", *sys.argv[1:]]),
        progress=show_progress,
    )
    print_sweep(result.rows)
    print_files(result.files)
