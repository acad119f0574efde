"""`anyres predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from anyres.cli.commands.values import Positive, present_device
from anyres.cli.paths import check_files, check_models
from anyres.cli.terminal import (
    note,
    print_table,
    write_csv,
)
from anyres.errors import UserError


def predict(
    model: str,
    files: list[str],
    *,
    size: str | None = None,
    names: str | None = None,
    bit_depth: int | None = None,
    topk: Positive = 5,
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5,
    batch_size: Positive = 32,
    device: str = "auto",
    layout: Literal["table", "csv"] = "table",
    output: str | None = None,
    pictures: str = "runs/predict",
) -> None:
    """Print a model's predictions for images or clips of any size: classes, segments or objects.

    Models for segmentation, detection and video also draw their predictions for every file.

    Args:
        model: a run, a saved model, a published weights file, a model name, or timm:NAME
        files: image files (clips for video models), or folders of them
        size: input size of the model, a side or HEIGHTxWIDTH; by default the largest training size
        names: file with the model's class names, one per line, to use instead of its own
        bit_depth: bits per channel of images with more than 8 bits, if the files do not say: 12, or 16 for dark images
        topk: number of classes to print per image
        threshold: lowest score of objects
        batch_size: images per forward pass of a classifier
        device: auto, cpu, cuda, …
        layout: print a readable table or CSV
        output: CSV file to write instead of printing
        pictures: folder for the drawn predictions
    """
    check_files(files)
    check_models([model])
    from anyres.data import Item
    from anyres.data.decode import with_depth
    from anyres.inference.files import check_folder, draw_results, find_files
    from anyres.inference.modelspec import open_model
    from anyres.inference.predictor import Predictor, read_size
    from anyres.io.files import check_file
    from anyres.tasks import task_of

    device = present_device(device)
    if output is not None:
        check_file(output, "predictions")
    if size is not None:
        read_size(size)  # report a mistake before anything is loaded
    network = open_model(model, names)[1]
    task = task_of(network)
    wanted = {"topk": topk, "threshold": threshold}
    options: dict[str, Any] = {name: value for name, value in wanted.items() if name in task.test_options.of_results}
    paths = find_files(files, task.kind)
    folder = Path(pictures)
    if task.draws:
        check_folder(folder, paths)
        batch_size = min(batch_size, task.test_batch_size)
    predictor = Predictor(network, size, device=device, batch_size=batch_size, **options)
    items = [Item(str(path), with_depth(path, bit_depth), None) for path in paths]
    found = (
        draw_results(predictor, items, folder) if task.draws else ((result, None) for result in predictor.stream(items))
    )
    rows: list[list[str]] = []
    problems: list[str] = []
    for result, picture in found:
        problems += [result.problem] if result.problem else []
        nothing = [[""] * len(task.columns)]
        lines = result.rows() or (nothing if task.draws or result.problem else [])
        drawn = [str(picture or "")] if task.draws else []
        rows += [[result.name, *line, *drawn, result.problem] for line in lines]
    header = ["image", *task.columns, *(["picture"] if task.draws else []), "problem"]
    if layout == "csv" or output is not None:
        write_csv(header, rows, output)
    else:
        shown = len(header) if problems else len(header) - 1
        print_table(header[:shown], [row[:shown] for row in rows])
    if problems:
        if len(problems) == len(paths):
            raise UserError(f"None of the {len(paths)} files could be read; reason for the first: {problems[0]}.")
        note(f"{len(problems)} of {len(paths)} files could not be read.")
