"""Runs that are killed, stopped, or meet a disk that is full: the next start ends where an undisturbed run does."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.data.pictures import encode, noise
from tests.fuzz.core import Failure, Kind, Ran, command, kept
from tests.fuzz.runs import OPTIONS, Outcome, finished, train_words, write_video

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree", "fsync")
"""The steps of a writer that are counted, killed at, or refused."""


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed, and what it took."""

    task: str
    outcome: Outcome
    seconds: float
    steps: int


@dataclass(frozen=True)
class Material:
    runs: list[Whole]
    items: dict[str, Path]
    """A picture or clip to predict, by task."""
    model: Path
    """A saved model."""


def prepare(folder: Path) -> Material:
    picture, clip = folder / "a.png", folder / "a.mp4"
    picture.write_bytes(encode(noise(40, 48), "PNG"))
    write_video(clip)
    runs = []
    for task in OPTIONS:
        began = time.monotonic()
        steps = folder / f"{task}.steps"
        Process(train_words(task, output=folder / task), partial(_count_steps, steps)).ended()
        seconds = time.monotonic() - began
        runs.append(Whole(task, Outcome.of(finished(folder, task)), seconds, steps.stat().st_size))
    items = {task: clip if task == "video" else picture for task in OPTIONS}
    return Material(runs, items, finished(folder, "classification") / "best")


# Disturbances ---------------------------------------------------------------------------------------------------------


def on_steps(act: Callable[[], None]) -> None:
    """Call `act` before every step of a writer in this process."""
    here = os.getcwd()
    fsync = os.fsync

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or (event == "open" and not _writes(arguments)):
            return
        path = arguments[0]
        if isinstance(path, int) or os.path.abspath(os.fsdecode(path)).startswith(here) or event == "os.rmdir":
            act()

    def fsync_counted(fd: Any) -> None:
        act()
        fsync(fd)

    sys.addaudithook(audit)
    os.fsync = fsync_counted


def _writes(arguments: tuple[Any, ...]) -> bool:
    return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _count_steps(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)

    def count() -> None:
        os.write(descriptor, b"x")

    on_steps(count)


def at_step(number: int, act: Callable[[], None], every_later: bool = False) -> None:
    """Call `act` at the step of this number, and at all that follow if asked for."""
    left = number

    def step() -> None:
        nonlocal left
        left -= 1
        if left == 0 or (left < 0 and every_later):
            act()

    on_steps(step)


def _refuse(number: int) -> None:
    raise OSError(number, os.strerror(number))


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# Processes ------------------------------------------------------------------------------------------------------------


class Process:
    """`anyres WORDS` in a child of this process, with something that disturbs it there."""

    def __init__(self, words: list[str], disturb: Callable[[], None] = lambda: None) -> None:
        self.answer, send = os.pipe()
        self.number = os.fork()
        if self.number == 0:
            try:
                disturb()
                ran = command(*words)
                os.write(send, json.dumps([words, ran.code, ran.out[-9000:], ran.err[-9000:]]).encode())
            except KeyboardInterrupt:
                os.write(send, json.dumps([words, 130, "", ""]).encode())
            except BaseException:
                os.write(send, traceback.format_exc()[-30_000:].encode())
            finally:
                os._exit(0)
        os.close(send)

    def ended(self) -> Ran | None:
        """How it went; None if a signal ended it. Raises Failure for an exception."""
        status = os.waitpid(self.number, 0)[1]
        with os.fdopen(self.answer, "rb") as pipe:
            text = pipe.read().decode()
        if os.WIFSIGNALED(status):
            return None
        if not text.startswith("["):
            raise Failure(f"a disturbed run raised {text.strip().splitlines()[-1][:80]}\n{text[-5000:]}")
        return Ran(*json.loads(text))


# Cases ----------------------------------------------------------------------------------------------------------------


def case(rng: random.Random, material: Material) -> str:
    if rng.random() < 0.15:
        return _converting(rng, material)
    chosen = rng.choice(material.runs)
    run = Path("run")
    for name in ("run/notes.txt", "run/thesis/chapter.txt", "theirs/best/x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("months of work")
    words = train_words(chosen.task, output=run, save_every_steps=rng.choice((1, 1, 2)))
    with kept(run / "notes.txt", run / "thesis", Path("theirs")):
        for _ in range(rng.choice((1, 1, 2, 3))):
            _disturbed(rng, chosen, words)
        if rng.random() < 0.3:
            _readable(run, material.items[chosen.task])
        ran = command(*words)
    if ran.code != 0:
        raise Failure(f"the run does not continue\n{ran.err[-3000:]}")
    chosen.outcome.check(run)
    return ran.verdict()


def _disturbed(rng: random.Random, chosen: Whole, words: list[str]) -> None:
    moment = partial(rng.uniform, 0, chosen.seconds)
    step = rng.randint(1, chosen.steps + 5)
    way = rng.randrange(8)
    if way < 2:
        process = Process(words)
        time.sleep(moment())
        os.kill(process.number, signal.SIGKILL)
        process.ended()
    elif way < 4:
        Process(words, partial(at_step, step, partial(_signal_own, signal.SIGKILL))).ended()
    elif way < 6:
        number = rng.choice((signal.SIGTERM, signal.SIGINT))
        process = Process(words, partial(at_step, step, partial(_signal_own, number)) if way == 4 else lambda: None)
        for _ in range(rng.choice((1, 1, 2)) if way == 5 else 0):
            time.sleep(moment())
            os.kill(process.number, number)
        ran = process.ended()
        if ran is not None and ran.code not in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            ran.verdict()
    else:
        refuse = partial(at_step, step, partial(_refuse, rng.choice(DISK)), rng.random() < 0.7)
        limit = partial(_limit_files, rng.choice((0, 100, 3000, 30_000, 100_000, 300_000)))
        ran = Process(words, refuse if way == 6 else limit).ended()
        if ran is None:
            raise Failure("a run that could not write died")
        ran.verdict()


def _signal_own(number: int) -> None:
    os.kill(os.getpid(), number)


def _readable(run: Path, item: Path) -> None:
    """Between a kill and the next start others may use what is there; they change nothing."""
    with kept(run):
        command("predict", run, item, "layout=csv").verdict()


def _converting(rng: random.Random, material: Material) -> str:
    """A saved model written over another: afterwards there is the one or the other, whole."""
    shutil.copytree(material.model, "out")
    act = partial(_refuse, errno.ENOSPC) if rng.random() < 0.3 else partial(_signal_own, signal.SIGKILL)
    ran = Process(["convert", str(material.model), "out"], partial(at_step, rng.randint(1, 25), act)).ended()
    if ran is not None:
        ran.verdict()
    for words in (["predict", "out", material.items["classification"]], ["convert", material.model, "out"]):
        done = command(*words)
        if done.code != 0:
            raise Failure(f"neither the old model nor the new one is there\n{done.err}")
    return done.verdict()


KIND = Kind("kills", case, prepare, short=0, long=400, batch=1, megabytes=1500, seconds=120)
