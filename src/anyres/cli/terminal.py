"""Output of the commands: tables, scores and lists of files.

All text is printed by `say`, `note` and `print_table`, which escape whatever is unsafe on a terminal.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from anyres.io.text import csv_text, printable, shorten

if TYPE_CHECKING:
    from anyres.evaluation.results import Row
    from anyres.tasks.scores import Measured


_LONGEST = 2000
"""Largest length of a note."""
_FOLDED = 12
"""Smallest width to which a text column of a table is folded."""
_NUMBER = re.compile(r"[ –]*|-?\d+(\.\d+)?( \d+\.\d+–\d+\.\d+)?( %|\*| )?", re.ASCII)


def say(text: object) -> None:
    """Print a line of results."""
    print(printable(text))


def note(text: object) -> None:
    """Print a line to stderr: progress, a warning or an error."""
    with suppress(OSError):  # stderr may be closed
        print(shorten(printable(text), _LONGEST), file=sys.stderr, flush=True)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Make output safe while a command runs.

    Log lines, warnings and the traceback of a bug are printed with `note`. Characters that the output cannot encode are
    escaped. Output to a stream that was closed before the start is dropped, as are results of all processes but the
    first.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    first = os.environ.get("RANK", "0") == "0"
    handler, logger = _Notes(), logging.getLogger("anyres")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(), nullcontext() if first else redirect_stdout(io.StringIO()):
            warnings.showwarning = _show_warning
            yield
    except Exception:  # a bug; Python is about to print its traceback
        sys.excepthook = _show_defect
        raise
    finally:
        logger.removeHandler(handler)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # a full disk or a closed pipe, reported by now; without this, exiting would fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    note(f"{filename}:{lineno}: {category.__name__}: {message}")


def _show_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
        note(line)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def show_progress(row: Row, done: int, total: int) -> None:
    size = f"{row.height}x{row.width}"
    result = f"{row.score:.1f} %" if row.score is not None else row.note
    note(f"[{done}/{total}] {row.model} at {size}: {result}")


def print_sweep(rows: list[Row]) -> None:
    """Print the main score by size, one column per model, with its interval; training sizes have an asterisk."""
    names = list(dict.fromkeys(row.model for row in rows))
    by_size: dict[tuple[int, int], dict[str, Row]] = {}
    for row in rows:
        by_size.setdefault((row.height, row.width), {})[row.model] = row
    table = []
    for (height, width), found in by_size.items():
        cells = [
            "–" if row is None or row.score is None else f"{row.score:.1f}{_range(row)}{'*' if row.trained else ' '}"
            for row in map(found.get, names)
        ]
        table.append([str(height) if height == width else f"{height}x{width}", *cells])
    print_table(["size", *names], table)
    from anyres.evaluation.results import SHORT_TITLES, main_score

    shares = dict.fromkeys(f"{row.count:,} of {row.of:,}" for row in rows if row.of and row.count + row.bad < row.of)
    about = [f"{SHORT_TITLES[main_score(rows)]} in percent", *(f"on {share} images" for share in list(shares)[:1])]
    if any(row.low is not None for row in rows):
        about.append("95 % interval over images" + ", range over runs" * any(row.runs > 1 for row in rows))
    say("; ".join([*about, "* a size that the model was trained at"]))


def _range(row: Row) -> str:
    return "" if row.low is None or row.high is None else f" {row.low:.1f}–{row.high:.1f}"


def print_files(files: dict[str, Path]) -> None:
    for what, path in files.items():
        say(f"{what + ':':10}{path}")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table; on a terminal, fold long texts (but not numbers) so that it fits."""
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    header, *rows = [[_encodable(cell) for cell in row] for row in (header, *rows)]
    table = Table(box=SIMPLE_HEAD, header_style="bold")
    folded = whole = 1  # width with every text folded, and with nothing folded; 3 between two columns
    for column, name in enumerate(header):
        cells = [row[column] for row in rows]
        numbers = all(map(_NUMBER.fullmatch, cells))
        table.add_column(Text(name), justify="right" if numbers and column else "left", overflow="fold",
                         no_wrap=numbers)  # fmt: skip
        width = max(map(cell_len, [name, *cells]))
        whole += width + 3
        folded += (width if numbers else min(width, _FOLDED)) + 3
    for row in rows:
        table.add_row(*map(Text, row))
    bounded = console.is_terminal or "COLUMNS" in os.environ
    console.width = max(console.width, folded) if bounded else whole
    # Do not let the console print it: rich exits the process if the reader of a pipe is gone.
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _encodable(cell: str) -> str:
    """Return a cell as it will be printed, so that its width is known."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(cell).encode(encoding, "backslashreplace").decode(encoding)


def print_csv(header: list[str], rows: list[list[str]]) -> None:
    """Print a table as CSV; see `csv_text`."""
    print(csv_text([header, *rows]), end="")


def print_scores(measured: Measured) -> None:
    scores = "  ".join(f"{name} {value:.2f}" for name, value in measured.scores.items())
    say(f"{scores}  over {measured.count} items")
    if measured.note:
        note(f"{measured.note}.")
    if measured.bad_images:
        note(f"{len(measured.bad_images)} could not be read, the first: {measured.bad_images[0]}.")
