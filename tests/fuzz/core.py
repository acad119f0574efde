"""Cases made from a seed, run in forked children of one warmed-up process, watched and counted.

A `Kind` makes its material once. Every case then gets a generator of its own, seeded by kind, seed and number, and an
empty folder to work in, and ends in a verdict:

- "worked": the command or call did what it is for;
- "refused": it ended in one sentence for the person who made the mistake;
- "began": it started work that takes long, and was left there.

Anything else is a failure: another exception, another exit code, a traceback on a stream, a process that dies, more
time or memory than the kind allows, a file that changes and is not ours, anything written outside the case's folder.

One file, though long: counting, isolating, timing and reporting a case belong together.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import io
import json
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SENTENCE, SHOWN = 20_000, 400_000
"""Characters of the longest sentence (what a person wrote is in it), and of all that a command may print."""


class Failure(AssertionError):  # noqa: N818 - it is what a case reports
    """What a case found."""


class Hang(BaseException):
    """The time of a case is over; no `except Exception` may swallow it."""


@dataclass(frozen=True)
class Kind:
    """A kind of case: `case(rng, material)` returns a verdict; the working folder is the case's own."""

    name: str
    case: Callable[[random.Random, Any], str]
    prepare: Callable[[Path], Any]
    """Makes what all cases share, in the folder given; what it returns is handed to each."""
    short: int
    """Cases in the default suite."""
    long: int
    """Cases with `-m fuzz`."""
    batch: int = 1
    """Cases that share a process: one where a case changes the process's state."""
    seconds: float = 30
    megabytes: int = 1000
    """What a case may add to the memory in use, if it does not begin work that takes what it takes."""


@dataclass
class Tally:
    """What came of a kind's cases."""

    kind: str
    seed: int
    verdicts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """By what they have in common: (case, text)."""
    seconds: float = 0.0

    def add(self, case: int, verdict: str, cause: str, text: str) -> None:
        self.verdicts[verdict] += 1
        if verdict == "failure":
            self.failures.setdefault(cause, []).append((case, text))

    def line(self) -> str:
        *fine, failures = (self.verdicts[name] for name in ("worked", "refused", "began", "failure"))
        cells = "".join(f"{number:8}" for number in (sum(fine) + failures, *fine))
        return f"{self.kind:14}{cells}{failures:9}{self.seconds:7.0f} s"

    def explained(self) -> Iterator[str]:
        """For each cause its first case in full, and the command that repeats it."""
        for cause, found in self.failures.items():
            case, text = found[0]
            yield f"{len(found)} x {cause}\n{repeat_command(self.kind, self.seed, case)}\n{text.rstrip()}\n"


HEADING = f"{'kind':14}{'cases':>8}{'worked':>8}{'refused':>8}{'began':>8}{'failures':>9}{'time':>9}"


def repeat_command(kind: str, seed: int, case: int) -> str:
    return f"pytest -n 0 -m fuzz tests/fuzz -k {kind} --fuzz-seed {seed} --fuzz-case {case}"


# Running --------------------------------------------------------------------------------------------------------------


def run_kind(kind: Kind, seed: int, cases: Sequence[int], root: Path, progress: Callable[[str], None]) -> Tally:
    """Run the cases of a kind in the folder of `scratch`; `progress` is told how far it is every ten seconds."""
    tally = Tally(kind.name, seed)
    began = told = time.monotonic()
    material = kind.prepare(new_folder(root / "material" / kind.name))
    gc.freeze()  # children then do not touch the pages that they share with this process
    done = 0
    while done < len(cases):
        done += _run_batch(kind, seed, material, cases[done : done + kind.batch], root, tally)
        if time.monotonic() - told > 10:
            told = time.monotonic()
            progress(f"{kind.name}: {done} of {len(cases)}, {tally.verdicts['failure']} failures")
    gc.unfreeze()
    tally.seconds = time.monotonic() - began
    return tally


CACHES = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder that is also the place of everything that libraries keep for themselves."""
    root = Path(tempfile.mkdtemp(prefix="anyres-fuzz-")).resolve()
    before = dict(os.environ)
    own = {name: str(new_folder(root / name.lower())) for name in CACHES}
    os.environ.update(own, HF_HUB_OFFLINE="1", COLUMNS="200")
    tempfile.tempdir = None  # read TMPDIR again
    try:
        yield root
    finally:
        os.environ.clear()
        os.environ.update(before)
        tempfile.tempdir = None
        shutil.rmtree(root, ignore_errors=True)


def new_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def _run_batch(kind: Kind, seed: int, material: Any, cases: Sequence[int], root: Path, tally: Tally) -> int:
    """Run cases in a forked child until it ends; how many of them are done with."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        noise = os.open(root / "noise", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(noise, 1)
        os.dup2(noise, 2)
        faulthandler.enable(noise)
        try:
            _child(kind, seed, material, cases, root, send)
        except BaseException:
            os.write(noise, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(send)
    done = 0
    hung = False
    with os.fdopen(receive, "rb") as pipe:
        while done < len(cases):
            hung = not select.select([pipe], [], [], 2 * kind.seconds + 30)[0]
            line = b"" if hung else pipe.readline()
            if not line:
                break
            tally.add(cases[done], *json.loads(line))
            done += 1
    if done < len(cases):  # the child is dead, or deaf to its alarm
        _kill_group(child)
        status = os.waitpid(child, 0)[1]
        cause = "does not end" if hung else f"the process ended with {_status(status)}"
        tally.add(cases[done], "failure", cause, f"{cause}\n{_tail(root / 'noise')}")
        done += 1
    else:
        os.waitpid(child, 0)
        _kill_group(child)  # what a case left running
    shutil.rmtree(root / "cases", ignore_errors=True)
    return done


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _tail(file: Path, size: int = 4000) -> str:
    """Return the end of a stream, without faulthandler's list of extension modules."""
    return file.read_text(errors="replace").partition("\nExtension modules")[0][-size:]


def _status(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit code {os.WEXITSTATUS(status)}"


def _child(kind: Kind, seed: int, material: Any, cases: Sequence[int], root: Path, send: int) -> None:
    os.setpgid(0, 0)
    # Address space, so that an absurd allocation is an error here and not the end of other people's work.
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (2 * kind.megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _time_is_over)
    touched: list[str] = []
    _forbid_elsewhere(root, touched)
    for case in cases:
        os.chdir(new_folder(root / "cases" / str(case)))
        verdict = _verdict(kind, random.Random(f"{kind.name}-{seed}-{case}"), material, touched)
        os.write(send, json.dumps(verdict).encode() + b"\n")
        os.chdir(root)
        shutil.rmtree(root / "cases" / str(case), ignore_errors=True)


def _verdict(kind: Kind, rng: random.Random, material: Any, touched: list[str]) -> tuple[str, str, str]:
    """(verdict, what failures of this cause have in common, the whole story)."""
    _reset_peak()
    before = _memory("VmRSS")
    try:
        signal.setitimer(signal.ITIMER_REAL, kind.seconds)
        try:
            verdict = kind.case(rng, material)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if touched:
            raise Failure(f"touched what is not its own: {touched.pop()}")
        added = _memory("VmHWM") - before
        if added > kind.megabytes and verdict != "began":
            raise Failure(f"took {added} MB")
    except BaseException as error:  # whatever it is, it is what we are looking for
        story = traceback.format_exc()
        return "failure", _cause(error), story if len(story) < 6000 else f"{story[:5000]}\n…\n{story[-500:]}"
    return verdict, "", ""


def _time_is_over(_number: int, _frame: Any) -> None:
    raise Hang


def _cause(error: BaseException) -> str:
    """What failures have in common: the kind of error and anyres' last line on its way, or what a `Failure` says."""
    if isinstance(error, Failure):
        return re.sub(r"[\d.]+|/\S+", "#", str(error).split("\n")[0])[:100]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}anyres{os.sep}" in frame.filename] or frames
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
    return f"{type(error).__name__} at {place}"


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    """A line of /proc/self/status in megabytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    assert found
    return int(found[1]) >> 10


_PATHS = {"os.rename": slice(2), "os.link": slice(1, 2), "os.symlink": slice(1, 2)}
_WRITES = (*_PATHS, *(f"os.{name}" for name in ("remove", "rmdir", "mkdir", "truncate", "chmod", "chown", "utime")))
"""Audit events that change files, and which of their arguments are those where it is not the first alone."""


def _forbid_elsewhere(root: Path, touched: list[str]) -> None:
    """From now on this process changes nothing outside `root`, runs no program and asks no network."""
    inside = (f"{root}{os.sep}", os.devnull, "/dev/shm/", "/proc/")

    def check(event: str, path: Any) -> None:
        if isinstance(path, int):  # an open file: how it was opened has been looked at
            return
        place = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
        place = os.path.join(place, os.path.basename(os.fsdecode(path)))
        if not place.startswith(inside):
            touched.append(f"{event} {place}")
            raise PermissionError(13, f"{event} is forbidden there", place)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                check(event, path)
        elif event in _WRITES:
            # `shutil.rmtree` goes down by names in open folders; where it began has been looked at.
            for path in (
                arguments[_PATHS.get(event, slice(1))] if event in _PATHS or arguments[-1] in (-1, None) else ()
            ):
                check(event, path)
        elif event == "shutil.rmtree":
            check(event, arguments[0])
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            touched.append(f"{event} {arguments[0]!r}")
            raise PermissionError(13, f"{event} is forbidden")
        elif event == "socket.connect" and not isinstance(arguments[1], str | bytes):
            raise ConnectionRefusedError(111, f"no network here: {arguments[1]!r}")

    sys.addaudithook(audit)


# What cases need ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code and streams."""

    words: list[str]
    code: int
    out: str
    err: str

    def verdict(self) -> str:
        """ "worked" or "refused". Raises Failure for anything else."""
        text = self.out + self.err
        complaint = ""
        if "Traceback (most recent call last)" in text:
            complaint = "a traceback was printed"
        elif len(text) > (SENTENCE if self.code else SHOWN):
            complaint = f"{len(text)} characters were printed"
        elif self.code not in (0, 2):
            complaint = f"exit code {self.code}"
        elif self.code == 2 and sum(line.startswith("anyres: ") for line in self.err.splitlines()) != 1:
            complaint = "exit code 2 without one sentence"
        elif re.search(r"MemoryError|can't allocate memory|Unable to allocate", text):
            complaint = "ran out of memory"
        if complaint:
            raise Failure(
                f"{complaint}\nanyres {shlex.join(self.words)[:3000]}\n{self.out[-2000:]}\n{self.err[-4000:]}"
            )
        return "worked" if self.code == 0 else "refused"


def command(*words: Any) -> Ran:
    """`anyres WORDS` in this process, with streams as strict as a terminal's. Exceptions that are no sentence pass."""
    from anyres.cli.main import main

    texts = [str(word) for word in words]
    before = sys.stdout, sys.stderr
    printed = io.BytesIO(), io.BytesIO()  # no files: some cases let those fail
    out, err = (
        io.TextIOWrapper(stream, "utf-8", errors, write_through=True)
        for stream, errors in zip(printed, ("strict", "backslashreplace"), strict=True)
    )
    sys.stdout, sys.stderr = out, err
    try:
        code = main(texts)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    finally:
        sys.stdout, sys.stderr = before
    return Ran(texts, code, *(stream.getvalue().decode(errors="replace") for stream in printed))


def check_sentence(error: Exception) -> None:
    """Whether what is told to a person is short enough to be read. Raises Failure."""
    if not str(error) or len(str(error)) > SENTENCE:
        raise Failure(f"a sentence of {len(str(error))} characters") from error


def in_child(work: Callable[[], None]) -> int:
    """Do something in a forked child, so that it leaves no threads and no settings here; its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def snapshot(*places: Path) -> dict[str, str]:
    """What stands in files and folders, by path: the hash of a file, where a link leads, a mark for a folder."""
    found: dict[str, str] = {}
    for place in places:
        for path in [place, *(sorted(place.rglob("*")) if place.is_dir() and not place.is_symlink() else [])]:
            if path.is_symlink():
                found[str(path)] = f"link to {os.readlink(path)}"
            elif path.is_dir():
                found[str(path)] = "folder"
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@contextmanager
def kept(*places: Path) -> Iterator[None]:
    """Whatever stands in these places before stands there afterwards. Raises Failure."""
    before = snapshot(*places)
    yield
    after = snapshot(*places)
    lost = [path for path, content in before.items() if after.get(path) != content]
    if lost:
        raise Failure(f"lost or changed: {lost[:5]}")
