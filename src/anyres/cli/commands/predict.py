"""`anyres predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from anyres.cli.commands.values import check_batch_size, check_device
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
    topk: int = 5,
    threshold: float = 0.5,
    batch_size: int = 32,
    device: str = "auto",
    layout: Literal["table", "csv"] = "table",
    output: str | None = None,
    pictures: str = "runs/predict",
) -> None:
    """Print what a model sees in images or clips, at any size: classes, segments, or objects.

    Models for segmentation, detection and video also write a picture for every file.

    Args:
        model: a run, a saved model, a published weights file, a name, or timm:NAME
        files: image files (for video models clips), or folders of them
        size: side or HEIGHTxWIDTH that images are prepared for; otherwise the largest training size
        names: file of the model's class names, one on a line, instead of those that it comes with
        bit_depth: bits of pictures of more than 8 bits, where the files do not say: 12, or 16 for dark ones
        topk: classes per image
        threshold: smallest score of objects
        batch_size: images per pass of a classifier
        device: auto, cpu, cuda, …
        layout: a table for people or CSV for programs
        output: a CSV file to write instead of printing
        pictures: folder of the pictures
    """
    from anyres.data import Item, parse_sizes
    from anyres.data.decode import with_depth
    from anyres.inference.modelspec import open_model
    from anyres.inference.predict import find_files
    from anyres.inference.predict import predict as run
    from anyres.inference.preparation import default_size
    from anyres.io.files import check_file
    from anyres.tasks import task_of

    place = check_device(device)
    shape = None
    if size is not None:
        shapes = parse_sizes(size)
        if len(shapes) != 1:
            raise UserError(f"size is {size!r}, but predict takes one: a side or HEIGHTxWIDTH.")
        shape = shapes[0]
    if topk < 1:
        raise UserError(f"topk is {topk}; it must be at least 1.")
    check_batch_size(batch_size)
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}; it must be between 0 and 1.")
    if output is not None:
        check_file(output, "predictions")
    network = open_model(model, names)[1]
    task = task_of(network)
    paths = find_files(files, "video" if task == "video" else "image")
    rows: list[list[str]] = []
    problems: list[str] = []
    if task == "classification":
        columns = ["rank", "label", "probability"]
        for item in run(network, paths, shape, topk, batch_size, place, bit_depth):
            problems += [item.problem] if item.problem else []
            cells = [
                [str(i), *pair]
                for i, pair in enumerate(zip(item.labels, map("{:.4f}".format, item.probabilities), strict=True), 1)
            ]
            rows += [[str(item.file), *line, item.problem] for line in cells or ([[""] * 3] if item.problem else [])]
    else:
        from anyres.inference.overlay import COLUMNS, check_folder, overlays

        check_folder(Path(pictures), paths)
        columns = [*COLUMNS[task], "picture"]
        shape = shape or default_size(network)
        items = [Item(str(path), with_depth(path, bit_depth), None) for path in paths]
        for found in overlays(network, items, Path(pictures), shape, topk=topk, threshold=threshold, device=place):
            problems += [found.problem] if found.problem else []
            lines = found.cells or [[""] * len(COLUMNS[task])]
            rows += [[found.name, *line, str(found.picture or ""), found.problem] for line in lines]
    header = ["image", *columns, "problem"]
    if layout == "csv" or output is not None:
        write_csv(header, rows, output)
    else:
        shown = len(header) if problems else len(header) - 1
        print_table(header[:shown], [row[:shown] for row in rows])
    if problems:
        if len(problems) == len(paths):
            raise UserError(f"None of the {len(paths)} files could be read, the first because: {problems[0]}.")
        note(f"{len(problems)} of {len(paths)} files could not be read.")
