"""A table of predictions for a list of files, written in parts, so that a killed run continues where it was.

Until the table OUTPUT is complete, there is a folder OUTPUT.partial beside it:

    run.json                        what was asked for; a continuation has to ask for the same
    files                           the files, fixed at the start (see `FileList`)
    rows-START-STOP-UNREADABLE.csv  the rows of the files from place START to before STOP, a whole table

A part appears whole or not at all, and the parts say by their names what is done: there is no other state. A process
that shares the work takes the next block of the list, leaves out what earlier runs did, and writes parts. When the
parts cover the list, the first process joins them to OUTPUT and removes the folder. Being killed between any two steps
costs at most the files of the part that was being made.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from anyres.errors import UserError
from anyres.inference.peers import Peers
from anyres.io import files
from anyres.io.tables import Table

logger = logging.getLogger(__name__)

KIND = "predictions"
SETTINGS, FILES = "run.json", "files"
PART_SECONDS, PART_FILES = 2.0, 4096
"""A part is written this often, or after this many files."""
BLOCK = 256
"""Files that a process takes at a time, or an eighth of its share of a short list."""
PATIENCE = 60
"""Seconds for which another machine may take to see what the first process wrote."""


class Wanted(NamedTuple):
    """A file to predict, and the name of the picture to draw of it; empty for none."""

    path: str
    picture: str = ""


class FileList:
    """A list of files on disk, of which only one place in 1024 is in memory: paths and pictures, each ended by NUL."""

    STEP = 1024

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets: list[int] = []
        self.count = position = 0
        with path.open("rb") as file:
            for entry in _entries(file):
                if self.count % self.STEP == 0:
                    self.offsets.append(position)
                position += sum(map(len, entry)) + 2
                self.count += 1

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Iterator[Wanted]:
        """Yield the files from place `start` to before `stop`."""
        if start >= stop:
            return
        with self.path.open("rb") as file:
            file.seek(self.offsets[start // self.STEP])
            for place, entry in enumerate(_entries(file), start // self.STEP * self.STEP):
                if place >= stop:
                    return
                if place >= start:
                    yield Wanted(*map(os.fsdecode, entry))

    @staticmethod
    def write(wanted: Iterable[Wanted], path: Path) -> None:
        with path.open("wb") as file:
            file.writelines(os.fsencode(text) + b"\0" for entry in wanted for text in entry)


def _entries(file: Any) -> Iterator[list[bytes]]:
    """Yield the pairs of texts that follow in an open file."""
    left, texts = b"", []
    while data := file.read(1 << 16):
        *whole, left = (left + data).split(b"\0")
        texts += whole
        yield from (texts[place : place + 2] for place in range(0, len(texts) - 1, 2))
        texts = texts[len(texts) // 2 * 2 :]


class Part(NamedTuple):
    """Finished rows: those of the files from place `start` to before `stop`, of which some are `unreadable`."""

    start: int
    stop: int
    unreadable: int

    def name(self, suffix: str) -> str:
        return f"rows-{self.start:09d}-{self.stop:09d}-{self.unreadable}{suffix}"


class UnfinishedTable:
    """The table `output` while it is being made; see the module's text. Use `opened`."""

    def __init__(self, output: Path, table: Table, peers: Peers) -> None:
        self.output, self.table, self.peers = output, table, peers
        self.folder = output.with_name(f"{output.name}.partial")
        self.wanted: FileList
        self.before: list[Part] = []
        """What earlier runs finished."""
        self.unreadable = 0
        """Files of the whole list that could not be read; known when all is done."""
        self._added: list[tuple[Sequence[Sequence[Any]], bool]] = []
        """Rows of the files of the next part, and whether they could be read; always whole, whenever a signal comes."""
        self._start_place = 0
        self._begun = 0.0

    @contextmanager
    def opened(self, settings: Mapping[str, Any], find: Callable[[], Iterable[Wanted]]) -> Iterator[Self]:
        """Start or continue the table; it is complete at the end of the block, where the first process joins it.

        After an exception, what was added remains for a continuation.

        Args:
            settings: values for JSON that decide what the rows are.
            find: returns the files; called only if the table is new.

        Raises:
            UserError: if the folder holds an unfinished table with other settings, or something else; if another
                process is writing it; or if the disk refuses.
        """
        first = self.peers.rank == 0
        with self.peers.together(), files.locked(self.folder) if first else nullcontext():
            if first:
                self._start(settings, find)
                self.peers.add("started")
            else:
                self.peers.wait("started")
                _appear(self.folder / SETTINGS)
            self.wanted = FileList(self.folder / FILES)
            self.before = self._parts()
            try:
                yield self
                self._write_part()
                self.peers.add("finished")
                if first:
                    self.peers.wait("finished", self.peers.world)
                    self._join()
            except BaseException:
                with suppress(UserError):  # it has been raised already, or the same will be met next time
                    self._write_part()
                if first and not self._parts():
                    files.remove_folder(self.folder, (SETTINGS, FILES))
                elif first:
                    logger.warning("%s holds what is done: the same command continues", self.folder)
                raise
        if first:
            with suppress(OSError):  # others may have put something there
                self.folder.rmdir()

    @property
    def typed(self) -> bool:
        return self.table.typed

    @property
    def total(self) -> int:
        return len(self.wanted)

    @property
    def done(self) -> int:
        """How many files earlier runs finished."""
        return sum(part.stop - part.start for part in self.before)

    def todo(self) -> Iterator[tuple[int, Wanted]]:
        """Yield the files that are left for this process, with their places in the list; blocks are taken as needed."""
        total = len(self.wanted)
        block = max(1, min(BLOCK, total // (8 * self.peers.world)))
        while (start := (self.peers.add("taken") - 1) * block) < total:
            for gap in self._gaps(start, min(start + block, total)):
                yield from enumerate(self.wanted.read(*gap), gap[0])

    def add(self, place: int, rows: Sequence[Sequence[Any]], readable: bool) -> None:
        """Add all rows of the file at a place."""
        if place != self._start_place + len(self._added):
            self._write_part()
        if not self._added:
            self._start_place, self._begun = place, time.monotonic()
        self._added.append((rows, readable))
        if len(self._added) >= PART_FILES or time.monotonic() - self._begun > PART_SECONDS:
            self._write_part()

    def _start(self, settings: Mapping[str, Any], find: Callable[[], Iterable[Wanted]]) -> None:
        path = self.folder / SETTINGS
        files.check_file(path, KIND)
        text = json.dumps(settings, indent=1)
        if not self._parts():
            with files.atomic_write(self.folder / FILES, KIND) as temporary:
                FileList.write(find(), temporary)
            with files.atomic_write(path, KIND) as temporary:
                temporary.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            raise UserError(f"{self.folder} holds rows without {SETTINGS}: move it away or choose another output")
        before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
        if before != now:
            raise UserError(
                f"{self.folder} is an unfinished run with other settings ({_differences(before, now)}): give the same "
                "as before to continue it, move it away to start anew, or choose another output"
            )

    def _parts(self) -> list[Part]:
        """Return the parts that are there, in order."""
        pattern = re.compile(rf"rows-(\d+)-(\d+)-(\d+){re.escape(self.output.suffix)}")
        matches = map(pattern.fullmatch, os.listdir(self.folder))
        return sorted(Part(*map(int, match.groups())) for match in matches if match)

    def _gaps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield what earlier runs left of the places from `start` to before `stop`."""
        first = bisect_right(self.before, start, key=lambda part: part.stop)
        for part in self.before[first:]:
            if part.start >= stop:
                break
            if part.start > start:
                yield start, part.start
            start = part.stop
        if start < stop:
            yield start, stop

    def _write_part(self) -> None:
        added, self._added = self._added, []
        if added:
            start, unreadable = self._start_place, sum(not readable for _, readable in added)
            part = Part(start, start + len(added), unreadable)
            with files.atomic_write(self.folder / part.name(self.output.suffix), KIND) as temporary:
                self.table.write([row for rows, _ in added for row in rows], temporary)

    def _join(self) -> None:
        """Join the parts to the output, and remove them."""
        parts = self._parts()
        edges = [0, *(edge for part in parts for edge in (part.start, part.stop)), len(self.wanted)]
        if edges[::2] != edges[1::2]:
            raise UserError(
                f"{self.folder} does not hold the rows of every file once, as if a part had been removed or two "
                "commands had written there: the same command makes what is missing; or move it away to start anew"
            )
        names = [part.name(self.output.suffix) for part in parts]
        with files.atomic_write(self.output, KIND) as temporary:
            self.table.join((self.folder / name for name in names), temporary)
        self.unreadable = sum(part.unreadable for part in parts)
        files.remove_folder(self.folder, (*names, FILES, SETTINGS))


def _appear(path: Path) -> None:
    """Wait for a file that another machine wrote. Raises UserError if it does not appear."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{path} of the first process is not here: choose an output on a disk that all machines share"
            )
        time.sleep(1)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return what differs between two settings: the values if they are short, and otherwise only the names."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    pairs = {name: [json.dumps(values.get(name)) for values in (before, now)] for name in names}
    short = [f"{name} was {old} and is now {new}" for name, (old, new) in pairs.items() if len(old + new) <= 80]
    return "; ".join(short) or f"other {', '.join(names)}"
