"""The `anyres` command."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

from anyres.allocator import keep_memory
from anyres.cli.arguments import parse
from anyres.cli.commands import COMMANDS
from anyres.cli.terminal import note, safe_streams
from anyres.errors import UserError

ABOUT = """Vision transformers that work at any input size.

  anyres demo                                  train and compare two networks on built-in images
  anyres train resformer_small data=IMAGENET   train at several resolutions at once
  anyres sweep runs/a runs/b data=IMAGENET     measure accuracy and cost at many sizes, with plots
  anyres segment train resformer_small data=ADE20K head=upernet
"""


P = ParamSpec("P")


class _Stop(KeyboardInterrupt):
    """A signal that asks the command to end.

    Not KeyboardInterrupt itself: if one passes through the `exec` of a text (a dataclass that is being defined),
    `python -m anyres` ends itself by SIGINT later, whatever exit code was asked for.
    """


def interruptible(command: Callable[P, int]) -> Callable[P, int]:
    """Make SIGINT and SIGTERM end a command with a short message and the exit code that shells expect."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        if threading.current_thread() is not threading.main_thread():  # only the main thread can set signal handlers
            return command(*args, **kwargs)
        received: list[int] = []

        def stop(number: int, _frame: Any) -> None:
            if not received:
                deadline.start()
            received.append(number)
            raise _Stop

        def end() -> int:
            sentence = "terminated" if received[0] == signal.SIGTERM else "interrupted"
            note(f"anyres: {sentence}.")
            return 128 + received[0]

        # The exception may be swallowed, for example by an extension module that is being imported.
        deadline = threading.Timer(10, lambda: os._exit(end()))
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return command(*args, **kwargs)
        except BaseException:  # a half-imported module may raise anything
            if not received:
                raise
            return end()
        finally:
            deadline.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    return run


@safe_streams()
@interruptible
def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code; for bad input, print an error message to stderr and return 2."""
    keep_memory()
    try:
        command, values = parse("anyres", ABOUT, COMMANDS, sys.argv[1:] if arguments is None else arguments)
        command(**values)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the pipe has closed it
        return 0
    except OSError as error:
        note(f"anyres: {_os_sentence(error)}")
        return 2
    except UserError as error:
        note(f"anyres: {error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        sentence = _machine_sentence(error)
        if sentence is None:
            raise
        note(f"anyres: {sentence}")
        return 2
    return 0


def _machine_sentence(error: MemoryError | RuntimeError) -> str | None:
    """Return what to do about an error that the machine's limits explain, or None for any other one."""
    text = str(error)
    if text.startswith("DataLoader worker"):  # a defect inside of one starts with "Caught"
        return f"a data loading process has ended ({text}): its memory may have run out; use fewer workers."
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "the memory has run out: use a smaller batch_size, smaller sizes or fewer workers."
    return None


def _os_sentence(error: OSError) -> str:
    fixes = {
        errno.ENOSPC: "the disk is full: free some space, or choose another output folder",
        errno.EACCES: "permission denied: choose a path that you can read and write",
        errno.EROFS: "the file system is read-only: choose another output folder",
        errno.EDQUOT: "the disk quota is used up: free some space, or choose another output folder",
    }
    if error.errno is None:
        return str(error)
    place = f"{error.filename}: " if error.filename else ""
    unnamed = f"reading or writing a file failed ({error.strerror}): check the disk"
    return f"{place}{fixes.get(error.errno, error.strerror if place else unnamed)}."
