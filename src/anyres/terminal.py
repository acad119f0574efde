"""What commands print: tables, scores, lists of files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyres.evaluation.results import Measured, Row


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def show_progress(row: Row, done: int, total: int) -> None:
    size = f"{row.height}x{row.width}"
    result = f"{row.score:.1f} %" if row.score is not None else row.note
    print(f"[{done}/{total}] {row.model} at {size}: {result}", file=sys.stderr)


def print_sweep(rows: list[Row]) -> None:
    """The main score by size, one column per model; training sizes carry a star."""
    names = list(dict.fromkeys(row.model for row in rows))
    by_size: dict[tuple[int, int], dict[str, Row]] = {}
    for row in rows:
        by_size.setdefault((row.height, row.width), {})[row.model] = row
    table = []
    for (height, width), found in by_size.items():
        cells = [
            "–" if row is None or row.score is None else f"{row.score:.1f}{'*' if row.trained else ' '}"
            for row in map(found.get, names)
        ]
        table.append([str(height) if height == width else f"{height}x{width}", *cells])
    print_table(["size", *names], table)
    from anyres.evaluation.results import SHORT_TITLES, main_score

    print(f"{SHORT_TITLES[main_score(rows)]} in percent; * a size that the model was trained at")


def print_files(files: dict[str, Path]) -> None:
    for what, path in files.items():
        print(f"{what + ':':10}{path}")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, header_style="bold")
    for column, name in enumerate(header):
        numbers = all(row[column].strip(" *–.%").replace(".", "").isdigit() for row in rows if row[column].strip(" –"))
        table.add_column(name, justify="right" if numbers and column else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write_csv(header: list[str], rows: list[list[str]], output: str | None) -> None:
    import csv

    from anyres.files import atomic_write

    if output is None:
        csv.writer(sys.stdout, lineterminator="\n").writerows([header, *rows])
        return
    with atomic_write(output, "predictions") as temporary, temporary.open("w", newline="") as handle:
        csv.writer(handle, lineterminator="\n").writerows([header, *rows])
    print(f"wrote {output}")


def print_scores(measured: Measured) -> None:
    scores = "  ".join(f"{name} {value:.2f}" for name, value in measured.scores.items())
    print(f"{scores}  over {measured.count} items")
    if measured.bad_images:
        print(f"{len(measured.bad_images)} could not be read, the first: {measured.bad_images[0]}.", file=sys.stderr)
