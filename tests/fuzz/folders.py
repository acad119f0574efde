"""Folders of damaged pictures with strange names through `predict` and `sweep`: every file is in the result."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

from tests.fuzz.annotations import NAMES
from tests.fuzz.core import Failure, Kind, command, kept
from tests.fuzz.images import mutate_picture, pictures
from tests.fuzz.runs import finished, until_work

TASKS = ("classification", "segmentation", "detection")
NOT_HIDDEN = [name for name in NAMES if not name.startswith((".", "-"))]
FILES = 10


def prepare(folder: Path) -> dict[str, Any]:
    return {"runs": [finished(folder, task) / "best" for task in TASKS], "pictures": pictures()}


def case(rng: random.Random, material: dict[str, Any]) -> str:
    run = rng.choice(material["runs"])
    root = Path(rng.choice(("album", "my album", "d[", *NOT_HIDDEN)))
    root.mkdir()
    names = [f"{rng.choice(('', rng.choice(NOT_HIDDEN)))[:60]}{number}.png" for number in range(FILES)]
    for name in names:
        data = rng.choice(material["pictures"]) if rng.random() < 0.3 else mutate_picture(rng, material["pictures"])
        (root / name).write_bytes(data)
    layout = rng.choice(("table", "csv", "output"))
    how = "output=out.csv" if layout == "output" else f"layout={layout}"
    words = ["predict", run, root, how, "topk=1", f"batch_size={rng.choice((1, 3, 32))}", "pictures=seen"]
    with kept(root, run):
        ran, verdict = until_work(lambda: command(*words), seconds=50)
    if ran is not None and "\x1b" in ran.out + ran.err:
        raise Failure("an escape sequence of a file's name reached the terminal")
    if ran is not None and verdict == "worked" and layout != "table":
        text = Path("out.csv").read_bytes().decode(errors="surrogateescape") if layout == "output" else ran.out
        _check_rows(text, root, names)
    return verdict


def _check_rows(text: str, root: Path, names: list[str]) -> None:
    """Every file has a row, and no cell is a formula."""
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    images = {row["image"] for row in rows}
    if len(images) != len(names):
        raise Failure(f"{len(images)} of {len(names)} files are in the result")
    formulas = [cell for row in rows for cell in row.values() if cell and cell.startswith(("=", "@"))]
    if formulas:
        raise Failure(f"a spreadsheet would run {formulas[0]!r}")


KIND = Kind("folders", case, prepare, short=20, long=2000, batch=1, megabytes=1500, seconds=60)
