"""The `anyres` command."""

from __future__ import annotations

import errno
import os
import sys

from anyres.arguments import parse
from anyres.commands import COMMANDS
from anyres.errors import UserError
from anyres.terminal import note, safe_streams

ABOUT = """Vision transformers that work at any input size.

  anyres demo                                  train, compare and show the main result on built-in images
  anyres train resformer_small data=IMAGENET   train at several resolutions at once
  anyres sweep runs/a runs/b data=IMAGENET     accuracy and cost at many sizes, with pictures
  anyres segment train resformer_small data=ADE20K head=upernet
"""


@safe_streams()
def main(arguments: list[str] | None = None) -> int:
    """Run a command; bad input gives one sentence on the error stream and exit code 2."""
    try:
        command, values = parse("anyres", ABOUT, COMMANDS, sys.argv[1:] if arguments is None else arguments)
        command(**values)
        sys.stdout.flush()
    except KeyboardInterrupt:
        note("anyres: interrupted.")
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        return 0
    except OSError as error:
        note(f"anyres: {_os_sentence(error)}")
        return 2
    except ValueError as error:
        if not isinstance(error, UserError) and os.environ.get("ANYRES_DEBUG"):
            raise
        note(f"anyres: {error}")
        return 2
    return 0


def _os_sentence(error: OSError) -> str:
    fixes = {
        errno.ENOSPC: "the disk is full: free some space, or choose another output folder",
        errno.EACCES: "permission denied: choose a place that you may read and write",
        errno.EROFS: "the file system is read-only: choose another output folder",
        errno.EDQUOT: "the disk quota is used up: free some space, or choose another output folder",
    }
    if error.errno is None:
        return str(error)
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{fixes.get(error.errno, error.strerror)}."


if __name__ == "__main__":
    sys.exit(main())
