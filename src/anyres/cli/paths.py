"""Paths that a command was given, looked at before torch is imported: a typing error is told at once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anyres.errors import UserError

BUILT_IN = ("digits", "letters")


def check_data(*specs: Any) -> None:
    """Raise FileNotFoundError for a dataset that is neither built in, nor at a path, nor of another kind (hf:NAME)."""
    for spec in specs:
        if isinstance(spec, str) and spec not in BUILT_IN and ":" not in spec and not os.path.exists(spec):
            raise FileNotFoundError(
                f"there is no dataset {spec!r}: give {', '.join(BUILT_IN)}, the path of a folder, or another form that "
                "--help lists"
            )


def check_files(paths: Iterable[str]) -> None:
    """Raise FileNotFoundError for the first path at which there is nothing."""
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"There is no file or folder {path}: check the path.")


def members(spec: str) -> tuple[str, list[str]]:
    """(label or "", models) of LABEL:=MODEL+MODEL+…, where several are runs of one thing. The path of something is one
    model, whatever its name holds. Raises UserError for a `+` with nothing beside it."""
    label, rest = spec.split(":=", 1) if ":=" in spec else ("", spec)
    parts = [rest] if "+" not in rest or Path(rest).exists() else rest.split("+")
    if not all(parts):
        raise UserError(f"{spec} has a + with no model beside it: give RUN+RUN")
    return label, parts


def check_models(specs: Iterable[str]) -> None:
    """Raise FileNotFoundError for the first model that can only be a path and does not exist."""
    for path in (part for spec in specs for part in members(spec)[1]):
        named = ":" in path or "=" in path  # timm:NAME, hf-hub:OWNER/NAME, NAME=FILE
        if not named and (len(Path(path).parts) > 1 or path.endswith((".pth", ".safetensors"))):
            check_files([path])
