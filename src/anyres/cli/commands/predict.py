"""`anyres predict`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from anyres.cli.commands.values import Positive, present_device
from anyres.cli.paths import check_files, check_models
from anyres.cli.terminal import note, say
from anyres.errors import UserError

if TYPE_CHECKING:
    from anyres.cli.printed import PrintedRows
    from anyres.inference.unfinished import UnfinishedTable


def predict(
    model: str,
    files: list[str],
    *,
    size: str | None = None,
    names: str | None = None,
    bit_depth: int | None = None,
    topk: Positive = 5,
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5,
    batch_size: Annotated[int | None, Field(ge=1)] = None,
    workers: int = 0,
    device: str = "auto",
    layout: Literal["table", "csv", "jsonl"] = "table",
    output: str | None = None,
    draw: bool = True,
    pictures: str = "runs/predict",
) -> None:
    """Print a model's predictions for images or clips of any size: classes, segments or objects.

    Models for segmentation, detection and video also draw their predictions for every file. With an output file, the
    same command continues after an interruption, and processes started by torchrun share the files.

    Args:
        model: a run, a saved model, a published weights file, a model name, or timm:NAME
        files: image files (clips for video models), or folders of them
        size: input size of the model: a side or HEIGHTxWIDTH (by default the largest training size); native, which
            keeps the aspect ratio of each image, with the area of that size, or of SIZE in native:SIZE; or original,
            which leaves images as large as they are
        names: file with the model's class names, one per line, to use instead of its own
        bit_depth: bits per channel of images with more than 8 bits, if the files do not say: 12, or 16 for dark images
        topk: number of classes to print per image
        threshold: lowest score of objects
        batch_size: images of one shape per forward pass; by default 32 images, 8 clips, or 1 image for segmentation and
            detection
        workers: number of processes that decode images
        device: auto, cpu, cuda, …
        layout: print a readable table, CSV or JSON lines
        output: file to write instead of printing: .csv, .jsonl or .parquet
        draw: also draw the predictions of segmentation, detection and video
        pictures: folder for the drawn predictions
    """
    if output is None or not os.path.exists(f"{output}.partial"):  # files may vanish before a run is continued
        check_files(files)
    check_models([model])
    from anyres.cli.printed import opened_printer
    from anyres.cli.progress import FileProgress
    from anyres.inference.files import columns_of, predict_files, rows_of, settings_of, wanted_files
    from anyres.inference.modelspec import open_model
    from anyres.inference.peers import Peers
    from anyres.inference.predictor import Predictor, check_size
    from anyres.inference.unfinished import KIND, UnfinishedTable
    from anyres.io.files import check_file, is_stream
    from anyres.io.tables import table_kind
    from anyres.tasks import task_of

    device = present_device(device)
    if output is not None:
        check_file(output, KIND)
    printed = output is None or is_stream(Path(output))
    kind = None if printed else table_kind(str(output))
    if size is not None:
        check_size(size)  # report a mistake before anything is loaded
    peers = Peers()
    if peers.world > 1 and printed:
        raise UserError(f"{peers.world} processes cannot print one table: give an output file.")
    if peers.world > 1 and device == "cuda":
        device = present_device(f"cuda:{peers.local_rank}")
    network = open_model(model, names)[1]
    task = task_of(network)
    wanted: dict[str, Any] = {"topk": topk, "threshold": threshold}
    options = {name: value for name, value in wanted.items() if name in task.test_options.of_results}
    batch_size = batch_size or min(32, task.test_batch_size)
    predictor = Predictor(
        network, size, device=device, batch_size=batch_size, workers=workers, bit_depth=bit_depth, **options
    )
    folder = Path(pictures) if draw and task.draws else None
    columns = columns_of(task, draws=folder is not None)
    if kind is None:
        opened: Any = opened_printer(columns, list(wanted_files(files, task.kind, folder)), layout, output)
    else:
        opened = UnfinishedTable(Path(str(output)), kind(columns), peers).opened(
            settings_of(predictor, files, size, folder), lambda: wanted_files(files, task.kind, folder)
        )
    rows: PrintedRows | UnfinishedTable
    problem = ""
    with opened as rows:
        if rows.done and peers.rank == 0:
            note(f"{rows.done:,} of {rows.total:,} files are done already.")
        with FileProgress(rows.total, rows.done, task.kind, peers, bar=layout == "table" or not printed) as progress:
            for place, result, picture in predict_files(predictor, rows.todo(), folder or Path()):
                rows.add(place, rows_of(result, picture, columns, rows.typed), not result.problem)
                problem = problem or result.problem
                progress.step()
    if peers.rank > 0:
        return
    if not printed:
        say(f"wrote {output}")
    if rows.unreadable == rows.total:
        why = f"reason for the first: {problem}" if problem else f"the reasons are in {output}"
        raise UserError(f"None of the {rows.total} files could be read; {why}.")
    if rows.unreadable:
        note(f"{rows.unreadable} of {rows.total} files could not be read.")
