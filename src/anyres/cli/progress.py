"""Progress of a command that goes through many files."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from anyres.cli.terminal import note
from anyres.inference.peers import Peers

REFRESH_SECONDS = 0.5
LINE_SECONDS = (10.0, 60.0)
"""Without a bar, a line is printed this long after the start, and this often after that."""


class FileProgress:
    """Files done by all processes, files per second and time left, shown by the first process.

    On a terminal it is a bar, elsewhere a line from time to time.

    Args:
        total: number of files.
        done: how many were done before.
        kind: "image" or "video".
        bar: whether a bar may be drawn; not if results are printed to the same terminal.
    """

    def __init__(self, total: int, done: int, kind: str, peers: Peers, bar: bool = True) -> None:
        self._total, self._done, self._kind, self._peers = total, done, kind, peers
        console = Console(stderr=True)
        self._shown = peers.rank == 0
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not (bar and self._shown and console.is_terminal and not console.is_dumb_terminal),
        )
        self._task = self._bar.add_task("", total=total, completed=done)
        self._unsaid = 0
        self._start = self._looked = time.monotonic()
        self._next = self._start + LINE_SECONDS[0]

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self) -> None:
        """Count one file."""
        self._unsaid += 1
        now = time.monotonic()
        if now - self._looked < REFRESH_SECONDS:
            return
        count, self._unsaid, self._looked = self._peers.add("files", self._unsaid), 0, now
        text = speed(count, self._total - self._done - count, now - self._start, self._kind)
        self._bar.update(self._task, completed=self._done + count, description=text, refresh=True)
        if self._shown and self._bar.disable and now >= self._next:
            self._next = now + LINE_SECONDS[1]
            note(f"{self._done + count:,} of {self._total:,} files  {text}")


def speed(count: int, left: int, seconds: float, kind: str) -> str:
    """Return the speed and the time left, after `count` files took `seconds`."""
    remaining = timedelta(seconds=round(left * seconds / count)) if count else "–"
    return f"{count / seconds:.1f} {kind}s/s  {remaining} left"
