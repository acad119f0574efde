"""Checks of the paths in a command's arguments before torch is imported, so that typing errors are reported at once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anyres.errors import UserError

BUILT_IN = ("digits", "letters")


def check_data(*specs: Any) -> None:
    """Raise FileNotFoundError unless a dataset is built in, an existing path, or of another form such as hf:NAME."""
    for spec in specs:
        if isinstance(spec, str) and spec not in BUILT_IN and ":" not in spec and not os.path.exists(spec):
            raise FileNotFoundError(
                f"there is no dataset {spec!r}: give {', '.join(BUILT_IN)}, the path of a folder, or another form that "
                "--help lists"
            )


def check_files(paths: Iterable[str]) -> None:
    """Raise FileNotFoundError for the first path that does not exist."""
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"There is no file or folder {path}: check the path.")


def members(spec: str) -> tuple[str, list[str]]:
    """Split LABEL:=MODEL+MODEL+… into (label or "", models); several models are runs of the same training.

    A path that exists is one model, even if it contains a `+`. Raises UserError if a model next to a `+` is missing.
    """
    label, rest = spec.split(":=", 1) if ":=" in spec else ("", spec)
    parts = [rest] if "+" not in rest or Path(rest).exists() else rest.split("+")
    if not all(parts):
        raise UserError(f"{spec} has a + without a model on both sides: give RUN+RUN")
    return label, parts


def check_models(specs: Iterable[str]) -> None:
    """Raise FileNotFoundError for the first model that must be a path and does not exist."""
    for path in (part for spec in specs for part in members(spec)[1]):
        named = ":" in path or "=" in path  # timm:NAME, hf-hub:OWNER/NAME, NAME=FILE
        if not named and (len(Path(path).parts) > 1 or path.endswith((".pth", ".safetensors"))):
            check_files([path])
