"""Files from the web: downloaded once, resumed, checked, and read from the Hub's cache afterwards, also offline."""

from __future__ import annotations

import hashlib
import http.client
import logging
import re
import shutil
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from filelock import FileLock

from anyres.errors import UserError, first_line
from anyres.io import files
from anyres.io.text import printable

logger = logging.getLogger(__name__)

KIND = "download"
"""Kind of these files in a folder's record (see `anyres.io.files`), which holds their SHA-256."""

_HUB = "huggingface.co"
_CHUNK = 1 << 18
_PATIENCE = 30.0
"""Seconds without a byte after which a connection counts as lost."""
_PAUSES = (0.5, 1.0, 4.0)
"""Seconds before trying again, for each failure in a row that brought nothing."""
_STARTS = (b"PK\x03\x04", b"\x80")
"""First bytes of a torch file (a zip archive, or a pickle before 1.6) and of a pickle."""


def fetch(
    address: str,
    name: str,
    *,
    sha256: str = "",
    largest: int = 1 << 34,
    cache: str | Path | None = None,
    otherwise: str = "check the address",
) -> Path:
    """Return the local path of a weights file on the web, which is downloaded on first use.

    Files on the Hugging Face Hub go through its library. Others are kept in its folder for the assets of libraries
    (`HF_ASSETS_CACHE`), as NAME-HASH.SUFFIX. Interrupted downloads are resumed. One process downloads at a time.

    Args:
        address: an http or https URL.
        name: what the file is called in the cache, on the progress bar and in messages.
        sha256: the first digits of the file's SHA-256, if they are known. If not, the file's hash is recorded on first
            use, and compared with afterwards.
        largest: a longer file is refused, in bytes.
        cache: a folder to use in place of the Hub library's.
        otherwise: the end of the message if the file cannot be had: what else to do.

    Raises:
        UserError: it cannot be downloaded (with `HF_HUB_OFFLINE`, that is not tried), or is not what was published.
    """
    from huggingface_hub import cached_assets_path, constants

    try:
        if urlsplit(address).hostname == _HUB:
            return _from_hub(address, sha256, cache)
        if cache is None:
            with files.explained(Path(constants.HF_ASSETS_CACHE)):
                folder = cached_assets_path("anyres", "weights", "published")
        else:
            folder = Path(cache)
        suffix = Path(urlsplit(address).path).suffix
        path = folder / f"{name}-{hashlib.sha256(address.encode()).hexdigest()[:8]}{suffix or '.pth'}"
        if not path.is_file():
            if constants.HF_HUB_OFFLINE:
                raise _DownloadError("HF_HUB_OFFLINE is set")
            with files.explained(path):
                folder.mkdir(parents=True, exist_ok=True)
                lock = FileLock(path.with_name(f".{path.name}.lock"))
            with lock:
                if not path.is_file():  # another process may have been faster
                    _Download(address, name, path, sha256, largest).run()
        _check(path, sha256)
        return path
    except _DownloadError as failure:
        raise UserError(f"{name}: {address} cannot be downloaded ({failure}): {otherwise}") from failure


class _DownloadError(Exception):
    """Why a file cannot be downloaded, in a few words."""


def _from_hub(address: str, sha256: str, cache: str | Path | None) -> Path:
    """Download https://huggingface.co/OWNER/NAME/resolve/REVISION/FILE into the Hub's own cache."""
    from huggingface_hub import hf_hub_download

    owner, name, _, revision, *rest = urlsplit(address).path.strip("/").split("/")
    try:
        path = Path(hf_hub_download(f"{owner}/{name}", "/".join(rest), revision=revision, cache_dir=cache))
    except Exception as error:  # the library raises many kinds, including network errors
        raise _DownloadError(first_line(error)) from error
    if sha256 and not _sha256(path).startswith(sha256):
        raise UserError(f"{path} is not the published file, whose SHA-256 starts with {sha256}: delete it")
    return path


def _check(path: Path, sha256: str) -> None:
    """Raise UserError unless a file in the cache is what was downloaded, or else the published one."""
    known = files.recorded(path, KIND)
    if not known and not sha256:
        with suppress(UserError, OSError):  # the cache may be read-only
            files.adopt(path.parent, KIND, [path.name])
        return
    found = _sha256(path)
    if (known and found not in known) or not found.startswith(sha256):
        raise UserError(f"{path} is damaged or was changed (its SHA-256 is {found[:16]}…): delete it to download again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Downloading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Download:
    """One download; the arguments are those of `fetch`. What has arrived is in a file beside `path`, its part, whose
    name says which version of the file the server had."""

    address: str
    name: str
    path: Path
    sha256: str
    largest: int

    def run(self) -> None:
        """Receive the file, check it, and put it in place."""
        failures = 0
        while True:
            have = self.received()
            try:
                part = self.receive()
                break
            except HTTPError as error:
                reason = f"the server answers {error.code} {printable(error.reason)}"
                if error.code < 500 and error.code not in (408, 429):
                    raise _DownloadError(reason) from error
            except (OSError, http.client.HTTPException) as error:
                reason = first_line(getattr(error, "reason", None) or error)
            failures = 0 if self.received() > have else failures + 1
            if failures > len(_PAUSES):
                raise _DownloadError(reason)
            time.sleep(_PAUSES[max(failures - 1, 0)])
        found, before = _sha256(part), files.recorded(self.path, KIND)
        if not found.startswith(self.sha256) or (before and found not in before):
            part.unlink()
            known = self.sha256 or "/".join(digest[:16] for digest in before)
            raise _DownloadError(f"its SHA-256 is {found[:16]}…, and that of the published file is {known}…")
        with files.atomic_write(self.path, KIND) as temporary:
            part.replace(temporary)

    def parts(self) -> list[Path]:
        return list(self.path.parent.glob(f".{self.path.name}.????????.part"))

    def received(self) -> int:
        return sum(part.stat().st_size for part in self.parts())

    def drop(self) -> None:
        for part in self.parts():
            part.unlink()

    def receive(self) -> Path:
        """Receive the rest of the file into its part, and return that. Raises OSError if the connection is lost."""
        part = next(iter(self.parts()), None)
        have = part.stat().st_size if part else 0
        with _open(self.address, have) as response:
            resumed, total = _extent(response, have)
            version = response.headers.get("ETag") or response.headers.get("Last-Modified")
            digest = hashlib.sha256(f"{version} {total}".encode()).hexdigest()[:8]
            current = self.path.with_name(f".{self.path.name}.{digest}.part")
            if part and (not resumed or current != part):  # the server cannot resume, or has another version by now
                self.drop()
                if resumed:
                    return self.receive()
                have = 0
            self.check(response, total, have)
            with files.explained(current):
                file = current.open("ab")
            with file, self.bar(total) as bar:
                while chunk := bytes(response.read(_CHUNK)):
                    if not have and not _is_weights(chunk, self.path):
                        raise _DownloadError("the server sends something else than a weights file")
                    have += len(chunk)
                    self.check_length(have)
                    with files.explained(current):
                        file.write(chunk)
                    bar.update(bar.task_ids[0], completed=have)
        if have < total:
            raise ConnectionError(f"the connection was lost after {have} of {total} bytes")
        return current

    def check(self, response: Any, total: int, have: int) -> None:
        """Raise unless what the server is about to send may be the file, and there is room for it."""
        if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            raise _DownloadError("the server sends a web page in place of the file")
        if (response.headers.get("Content-Encoding") or "identity") != "identity":
            raise _DownloadError("the server sends it compressed, which was not asked for")
        self.check_length(total)
        folder = self.path.parent
        if total - have > shutil.disk_usage(folder).free:
            raise UserError(f"{folder} has no room for {total / 1e6:.0f} MB: make room, or set HF_HOME to another disk")

    def check_length(self, length: int) -> None:
        if length > self.largest:
            self.drop()
            raise _DownloadError(f"it is larger than {self.largest / 1e6:.0f} MB, which is too much for these weights")

    def bar(self, total: int) -> Any:
        """Return a progress bar, or where one cannot move, print a line and return one that stays hidden."""
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        moves = console.is_terminal and not console.is_dumb_terminal
        if not moves:
            size = f", {total / 1e6:.0f} MB" if total else ""
            logger.warning("downloading %s from %s%s", self.name, self.address, size)
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
        bar = Progress(*columns, console=console, disable=not moves)
        bar.add_task(self.name, total=total or None)
        return bar


def _open(address: str, have: int) -> Any:
    """Ask for a file from byte `have` on."""
    headers = {"User-Agent": "anyres", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    opener = urllib.request.build_opener(_Redirects)
    try:
        return opener.open(urllib.request.Request(address, headers=headers), timeout=_PATIENCE)
    except HTTPError as error:
        if error.code != 416 or not have:
            raise
        error.close()  # no byte is left to send: ask for all of them
        return _open(address, 0)


def _extent(response: Any, have: int) -> tuple[bool, int]:
    """Return whether the answer continues at byte `have`, and the length of the whole file, 0 if that is not said."""
    if response.status == 206:
        extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range") or "")
        if extent and int(extent[1]) == have:
            return True, int(extent[2])
        raise ConnectionError("the server answers with another part of the file than was asked for")
    length = response.headers.get("Content-Length") or ""
    return False, int(length) if length.isdigit() else 0


def _is_weights(start: bytes, path: Path) -> bool:
    return start[8:9] == b"{" if path.suffix == ".safetensors" else start.startswith(_STARTS)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirections, but only to the web, and never from an encrypted connection to an open one."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in ({"https"} if req.type == "https" else {"http", "https"}):
            raise _DownloadError(f"it is redirected to {printable(newurl)[:80]}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
