"""Atomic file writes, which never overwrite or delete anything that anyres did not write.

Every folder that anyres writes to has a record, `.anyres.jsonl`, with one line per file: its name, kind and SHA-256.
The line is added before the file is put in place. A file without a line belongs to someone else: it is neither replaced
nor deleted, and a `UserError` names it.

One file, though long: writing, replacing, adopting and reading all share the record.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from anyres.errors import UserError
from anyres.io.text import printable

logger = logging.getLogger(__name__)
T = TypeVar("T")

RECORD = ".anyres.jsonl"
LOCK = ".anyres.lock"
_TEMPORARY = (".anyres-", ".tmp")
"""What comes before and after the eight random letters of a temporary name; the file's own suffix follows."""
_OTHERS = (".DS_Store", "Thumbs.db")
"""Files that file managers leave in folders."""


# Writing --------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | Path, kind: str) -> Iterator[Path]:
    """Yield a temporary path; on success it is flushed to disk and renamed to `path`.

    Readers see either the old file or the new one, never a partial one. After an exception nothing is left behind.
    Links are followed, and anything that is not a regular file (a pipe, /dev/stdout) is written to instead of replaced.

    Raises:
        UserError: `path` exists and is not a file of this `kind` as written by anyres, or it cannot be written.
    """
    path = Path(path)
    if is_stream(path):
        with explained(path), tempfile.TemporaryDirectory() as folder:
            yield (temporary := Path(folder) / f"stream{path.suffix}")
            with temporary.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    path = Path(os.path.realpath(path))
    check_file(path, kind)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Keep the suffix, because many libraries infer the format from it.
        descriptor, name = tempfile.mkstemp(_TEMPORARY[1] + path.suffix, _TEMPORARY[0], path.parent)
        os.close(descriptor)
    temporary = Path(name)
    try:
        with explained(path):  # nested: a full disk is only detectable before the incomplete file is removed
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            _add_to_record(path.parent, [_line(path.name, kind, temporary)])
            temporary.replace(path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, kind: str, names: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary folder for the files `names`; on success they are flushed, and the folder replaces `path`.

    A folder cannot be replaced in a single system call, so an existing one is first renamed to `.<name>.old`. If the
    process is killed between the two renames, the old folder is still whole: `existing` finds it, and `recover_folder`
    restores it.

    Raises:
        UserError: see `check_folder`.
    """
    path = Path(os.path.abspath(path))
    check_folder(path, kind, names)
    with explained(path):
        recover_folder(path, kind, names)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(_TEMPORARY[1], _TEMPORARY[0], path.parent))
    try:
        with explained(path):
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            files = [temporary / name for name in names]
            _add_to_record(temporary, [_line(file.name, kind, file) for file in files])
            for file in files:
                file.chmod(0o666 & ~_umask())  # safetensors makes its files readable by their owner only
                _sync(file)
            _sync(temporary)
            if path.exists():
                path.replace(_old(path))
            temporary.replace(path)
            _sync(path.parent)
            remove_folder(_old(path), names)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Convert write errors (full disk, no permission, name too long, …) to a UserError with one clear message."""
    try:
        yield
    except BrokenPipeError:  # not an error: the reader of a pipe has seen enough
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save hides the cause of a failed write.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error) or _is_full(path):
            reason = "the disk is full; make room"
        elif isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif "inline_container" in str(error):  # raised by torch's writer, for instance at a file-size limit
            reason = "the disk refused it, or a limit on the size of files (ulimit -f) did; make room"
        else:
            raise
        raise UserError(f"cannot write {path}: {reason}, or choose another output") from error


# What may be replaced and removed -------------------------------------------------------------------------------------


def check_file(path: str | Path, kind: str) -> None:
    """Raise UserError unless `atomic_write` may write `path`; call this before the work that produces the file."""
    path = Path(path)
    if not is_stream(path):
        path = Path(os.path.realpath(path))
        check_files(path.parent, kind, [path.name])


def check_files(folder: str | Path, kind: str, names: Iterable[str]) -> None:
    """Raise UserError unless all these files may be written to the folder, which need not exist."""
    folder = Path(folder)
    place = _nearest(folder)
    if not place.is_dir():
        raise UserError(f"{place} is not a folder: choose another output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {folder}: there is no permission to write into {place}; choose another output")
    with explained(folder):
        record = _record(folder)
    for path in (folder / name for name in names):
        with explained(path):
            if _exists(path) and not _is_own(path, kind, record):
                raise UserError(
                    f"{path} exists, and it is not a {kind} file as anyres wrote it: move it away or choose another "
                    "output"
                )


def check_folder(path: str | Path, kind: str, names: Sequence[str]) -> None:
    """Raise UserError unless `atomic_folder` may replace `path` with a folder of the files `names`.

    It may do so if `path` does not exist, or is a folder with nothing but these files as anyres wrote them.
    """
    path = Path(os.path.abspath(path))
    check_files(path.parent, kind, [])
    with explained(path):
        if _exists(path) and (path.is_mount() or path.samefile(os.curdir)):
            raise UserError(f"{path} cannot be replaced, since you are in it or it is a disk: choose a folder in it")
        for place in filter(_exists, (path, _old(path))):
            if place.is_symlink() or not place.is_dir():
                raise UserError(f"{place} is a file or a link, and no folder: move it away or choose another output")
            foreign = _find_foreign(place, kind, names)
            if foreign is not None:
                raise UserError(
                    f"{place} holds {foreign.name}, which anyres did not write or which was changed since: "
                    "move it away or choose another output"
                )


def _find_foreign(folder: Path, kind: str, names: Sequence[str]) -> Path | None:
    """Return the first entry of a folder that is not one of the files `names` as anyres wrote it, or None."""
    record = _record(folder)
    for path in sorted(folder.iterdir()):
        free = path.name in (RECORD, *_OTHERS) and stat.S_ISREG(path.lstat().st_mode)
        if not free and not (path.name in names and _is_own(path, kind, record)):
            return path
    return None


def remove_folder(folder: Path, names: Sequence[str]) -> None:
    """Remove those of these files that anyres wrote, and then the folder unless it contains anything else."""
    for name in (*names, *_OTHERS, RECORD):  # the record last, in case the process is killed in between
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def recover_folder(path: Path, kind: str, names: Sequence[str]) -> None:
    """Restore the previous folder if `atomic_folder` was killed before the new one was put in place."""
    old = _old(path)
    if old.is_dir() and not old.is_symlink() and _find_foreign(old, kind, names) is None:
        if path.exists():
            remove_folder(old, names)
        else:
            old.replace(path)


def remove_temporary(folder: Path) -> None:
    """Remove temporary files left by killed processes; only the holder of the folder's lock may call this."""
    for path in folder.glob("????????".join(_TEMPORARY) + "*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def existing(path: str | Path) -> Path:
    """Return where an `atomic_folder` can be read: at `path`, or where a killed writer left the previous version."""
    path = Path(path)
    return _old(path) if not path.exists() and _old(path).is_dir() else path


def read_whole(path: str | Path, read: Callable[[Path], T]) -> T:
    """Return `read(folder)` for an `atomic_folder`; read again if a writer replaced the folder in the meantime."""
    while True:
        before = _identity(path)
        try:
            found = read(existing(path))
        except Exception:
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return found


def _identity(path: str | Path) -> tuple[int, int] | None:
    """Return an identity of the folder that readers currently find; inode numbers alone may be reused."""
    try:
        status = existing(path).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def is_stream(path: Path) -> bool:
    """Return whether a path leads to a pipe or a character device, which can only be written to."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


# The record -----------------------------------------------------------------------------------------------------------


def is_recorded(folder: Path, kind: str) -> bool:
    """Return whether anyres wrote a file of this kind to the folder."""
    return f'"kind": "{kind}"'.encode() in _record(folder)


def is_damaged(path: Path, kind: str) -> bool:
    """Return whether a recorded file differs from what anyres wrote."""
    record = _record(path.parent)
    return bool(record) and _line(path.name, kind, path) not in record


def recorded(path: Path, kind: str) -> set[str]:
    """Return the SHA-256 of everything of this kind that anyres wrote to `path`, also of what is no longer there."""
    lines = [json.loads(line) for line in _record(path.parent).splitlines() if line.endswith(b"}")]
    return {line["sha256"] for line in lines if (line["file"], line["kind"]) == (path.name, kind)}


def adopt(folder: Path, kind: str, names: Iterable[str]) -> None:
    """Record files that were written by a version of anyres without records."""
    paths = [folder / name for name in names]
    _add_to_record(folder, [_line(path.name, kind, path) for path in paths if path.is_file()])


def _is_own(path: Path, kind: str, record: bytes) -> bool:
    """Return whether anyres wrote this file and it is unchanged since; an empty file counts as ours."""
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and (not status.st_size or _line(path.name, kind, path) in record)


def _line(name: str, kind: str, path: Path) -> bytes:
    """Return the record line for a file called `name`, with the content that is now at `path`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return json.dumps({"file": name, "kind": kind, "sha256": digest}).encode() + b"\n"


def _record(folder: Path) -> bytes:
    try:
        return (folder / RECORD).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""


def _add_to_record(folder: Path, lines: Iterable[bytes]) -> None:
    known = _record(folder)
    new = b"".join(line for line in lines if line not in known)
    if new:
        never_through_a_link = getattr(os, "O_NOFOLLOW", 0)
        opener = lambda path, flags: os.open(path, flags | never_through_a_link, 0o666)  # noqa: E731
        with open(folder / RECORD, "ab", opener=opener) as file:
            # The newline terminates a partial line that a full disk may have left.
            file.write(new if known.endswith(b"\n") or not known else b"\n" + new)
            file.flush()
            os.fsync(file.fileno())


# One writer at a time -------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the lock of an output folder, creating the folder if needed; the lock ends with the process that holds it.

    If nothing is written to the folder, it is left as it was.

    Raises:
        UserError: another process holds the lock; the message says which.
    """
    folder = Path(folder)
    check_files(folder, "", [])
    is_new, lock, path = not folder.exists(), FileLock(folder / LOCK), folder / LOCK
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{folder} is in use by {_holder(path)}: wait until that ends, or choose another output"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            logger.warning("%s is on a disk without locks: let only one process write there", folder)
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        with suppress(PermissionError):  # Windows does not allow writing to a locked file
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            holder = printable(f"process {os.getpid()} on {platform.node()} ({command}, since {now})")
            path.write_text(holder, encoding="utf-8")
        remove_temporary(folder)
    try:
        yield
    finally:
        if not (folder / RECORD).exists():
            with suppress(PermissionError):
                path.unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def _holder(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8", errors="replace")
    except PermissionError:  # Windows does not allow reading a locked file
        return "another process"


# Small things ---------------------------------------------------------------------------------------------------------


def _exists(path: Path) -> bool:
    """Return whether anything exists at `path`, even a broken link. Raises OSError if it cannot be a path."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _nearest(path: Path) -> Path:
    """Return the path itself, or its nearest parent that exists."""
    while not os.path.exists(path) and path != path.parent:  # Path.exists raises for impossible names
        path = path.parent
    return path


def _is_full(path: Path) -> bool:
    return shutil.disk_usage(_nearest(path)).free < 1 << 20


def _sync(path: Path) -> None:
    """Flush a file's content, or the renames in a folder, to disk (folders on POSIX only)."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
