"""Where the authors' weights are (`published.csv`, a line per file), and fetching them."""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from anyres.errors import UserError
from anyres.io.download import fetch

_BY_HAND = {"drive.google.com": "Google Drive", "dl.dropbox.com": "Dropbox"}
"""Services that do not hand files to programs, by host."""


class Published(NamedTuple):
    """A published weights file. A network's first one is what `pretrained=True` loads."""

    name: str
    tag: str
    """What it was trained on, as in timm: `create_model("NAME.TAG", pretrained=True)`."""
    size: int
    """Side of the square images that its results are reported at."""
    classes: int
    sha256: str
    """First digits of its SHA-256, if the authors give them."""
    url: str
    """Address of the file, or of a page where a person can download it; empty if it was never published."""
    note: str

    @property
    def service(self) -> str:
        """The service that has the file, if only a person can download it there."""
        return _BY_HAND.get(urlsplit(self.url).hostname or "", "")

    @property
    def download(self) -> str | None:
        """The address, if a program can download from it."""
        return None if self.service else self.url or None

    @property
    def where(self) -> str:
        """Where the file is, in words."""
        note = f" ({self.note})" if self.note else ""
        if not self.url:
            return f"never published{note}"
        return f"on {self.service}, only for browsers{note}: {self.url}" if self.service else self.url


@cache
def published() -> dict[str, list[Published]]:
    """Return the files of every network, by its registered name."""
    found: dict[str, list[Published]] = {}
    with resources.files("anyres.models").joinpath("published.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            size, classes = int(row.pop("size")), int(row.pop("classes"))
            line = Published(size=size, classes=classes, **row)
            found.setdefault(line.name, []).append(line)
    return found


def fetch_weights(file: Published, parameters: int, cache: str | Path | None = None) -> Path:
    """Return the local path of a published file, which is downloaded on first use (see `io.download.fetch`).

    Args:
        file: the file.
        parameters: how many its network has, which bounds its length.
        cache: a folder to use in place of the Hub library's.

    Raises:
        UserError: it cannot be had; the message says where it is and how to load it.
    """
    load = f"give it as {file.name}=FILE to a command, or as checkpoint_path to create_model"
    if file.download is None:
        fix = f"download it there and {load}" if file.url else f"if you have a file of them, {load}"
        raise UserError(f"The weights of {file.name} are {file.where}; {fix}.")
    # At most weights, averaged weights and the two moments of an optimiser, in float32, and their names.
    largest = 20 * parameters + (1 << 24)
    otherwise = f"fetch that file with a browser or on another machine, and {load}."
    return fetch(file.download, file.name, sha256=file.sha256, largest=largest, cache=cache, otherwise=otherwise)
