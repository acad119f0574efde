"""Rows of predictions that are printed, or written to a pipe, rather than to a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from anyres.cli.terminal import print_table
from anyres.inference.unfinished import Wanted
from anyres.io.files import explained
from anyres.io.tables import Csv, JsonLines, TextTable


class PrintedRows:
    """The counterpart of `UnfinishedTable` for rows that are shown at once or in the end."""

    done = 0

    def __init__(self, wanted: Sequence[Wanted], show: Callable[[list[list[Any]]], None], typed: bool) -> None:
        self.wanted, self.show, self.typed = wanted, show, typed
        self.total = len(wanted)
        self.unreadable = 0

    def todo(self) -> Iterator[tuple[int, Wanted]]:
        return enumerate(self.wanted)

    def add(self, place: int, rows: list[list[Any]], readable: bool) -> None:
        self.unreadable += not readable
        self.show(rows)


@contextmanager
def opened_printer(
    columns: Mapping[str, type], wanted: Sequence[Wanted], layout: str, output: str | None
) -> Iterator[PrintedRows]:
    """Print rows in the layout "table" at the end, or as "csv" or "jsonl" as they come; `output` is a pipe or None."""
    if layout == "table" and output is None:
        rows: list[list[Any]] = []
        printed = PrintedRows(wanted, rows.extend, typed=False)
        yield printed
        shown = len(columns) if printed.unreadable else len(columns) - 1  # without the column of problems
        print_table(list(columns)[:shown], [[cell or "" for cell in row[:shown]] for row in rows])
        return
    table: TextTable = JsonLines(columns) if layout == "jsonl" else Csv(columns)
    writing = nullcontext if output is None else partial(explained, Path(output))
    with ExitStack() as stack:
        stream = sys.stdout
        if output is not None:
            stack.enter_context(writing())  # closing writes what is left
            stream = stack.enter_context(open(output, "w", encoding="utf-8"))

        def write(text: str) -> None:
            with writing():
                stream.write(text)
                stream.flush()

        write(table.header)
        yield PrintedRows(wanted, lambda rows: write(table.text(rows)), table.typed)
