"""Training states: everything that a run needs to continue as if it had never stopped, and its files on disk.

A state is a folder `state/step_000000123_000004/` (optimiser steps, epochs) that is written atomically. It contains the
weights, optimiser state, moving average, gradient scaler, random states of every process, position in the data, metrics
of the current epoch and finished rows of metrics.csv. metrics.csv and summary.json are always written from the state,
so a run killed in between loses and repeats nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from anyres.errors import UserError
from anyres.io import files, hub
from anyres.io.files import atomic_folder, atomic_write
from anyres.io.text import csv_text
from anyres.training.config import CONFIG_FILE, RunConfig

FOLDERS = ("best", "best_ema", "last", "last_ema")
FILES = (CONFIG_FILE, "metrics.csv", "summary.json")
STATE_FILE = "state.pt"
TENSORBOARD = Path("tensorboard", "anyres")
KIND = "run"
"""Name under which the folder's record lists `FILES` (see `anyres.io.files`)."""


@dataclass
class Position:
    """The progress of a run: small, plain values that are saved with every state."""

    epoch: int = 0
    """Number of finished epochs, which is also the index of the current one."""
    batch: int = 0
    """Number of batches used in the current epoch."""
    updates: int = 0
    """Optimiser steps since the start."""
    sums: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """This process's metrics of the current epoch: name -> [sum (a tensor on the device), count]. Saved separately."""
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """One row of metrics.csv for every finished epoch."""
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    """Best score and its epoch, for the weights ("best") and their moving average ("best_ema")."""
    bad: dict[str, str] = dataclasses.field(default_factory=dict)
    """Unreadable images found so far: name -> reason."""
    run_id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(6))
    """Identifier of the run in trackers."""
    seconds: float = 0.0
    """Total training time, including earlier starts of the run."""
    epoch_seconds: float = 0.0
    """Training time of the current epoch."""
    waited: float = 0.0
    """The part of `epoch_seconds` that was spent waiting for data."""


def rng_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators in types that `weights_only=True` can load."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    keys, position, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# The run folder -------------------------------------------------------------------------------------------------------


def check_folder(folder: Path, options: dict[str, Any]) -> None:
    """Raise UserError if a run with these options would overwrite or delete files that anyres did not write."""
    if not files.is_recorded(folder, KIND) and _lacks_record(folder):
        files.adopt(folder, KIND, FILES)
    # A config.yaml that the user edited is accepted if its options are those of this run; it is not rewritten.
    files.check_files(folder, KIND, FILES if _read_config(folder) != options else FILES[1:])
    for name in FOLDERS:
        hub.check_target(folder / name)
    if not files.is_recorded(folder, KIND):
        for name in ("state", "tensorboard"):
            if os.path.lexists(folder / name) and not _is_empty(folder / name):
                raise UserError(
                    f"{folder / name} exists but does not belong to an anyres run: move it or choose another output"
                )


def _lacks_record(folder: Path) -> bool:
    """Return whether the folder contains a run of version 0.1, which kept no record of its files."""
    options = _read_config(folder)
    return bool(saved_states(folder)) and {"model", "data", "output"} <= options.keys()


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the options in config.yaml under their current names; empty if the file is missing or unreadable."""
    try:
        found = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # the file may contain anything
        return {}
    return RunConfig.translated(found) if isinstance(found, dict) else {}


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def prepare_folder(folder: Path) -> None:
    """Create the run folder and clean up after a run that was killed. The caller must hold the folder's lock."""
    with files.explained(folder):
        (folder / "state").mkdir(parents=True, exist_ok=True)
        for name in FOLDERS:
            files.recover_folder(folder / name, hub.KIND, hub.NAMES)
        files.remove_temporary(folder / "state")


def clear_run(folder: Path) -> None:
    """Remove an earlier run's files, states first, so that a half-removed run is not resumed."""
    for state in saved_states(folder):
        files.remove_folder(state, [STATE_FILE])
    for name in FOLDERS:
        files.remove_folder(folder / name, hub.NAMES)
    for events in (folder / TENSORBOARD).glob("events.out.tfevents.*"):
        events.unlink()
    for name in FILES[1:]:
        (folder / name).unlink(missing_ok=True)


# States ---------------------------------------------------------------------------------------------------------------


def saved_states(folder: Path) -> list[Path]:
    """Return the states in a run folder, newest first."""
    states = (path.parent for path in (folder / "state").glob(f"step_*/{STATE_FILE}"))
    return sorted((path for path in states if re.fullmatch(r"step_\d{9}_\d{6}", path.name)), reverse=True)


def save_state(folder: Path, position: Position, content: dict[str, Any], keep: int) -> None:
    """Write a state, then keep it and the `keep - 1` states before it and remove older ones."""
    target = folder / "state" / f"step_{position.updates:09d}_{position.epoch:06d}"
    if target.exists():  # the name shows that it is ours, even if it could not be read
        files.adopt(target, "state", [STATE_FILE])
    with atomic_folder(target, "state", [STATE_FILE]) as temporary:
        fields = dict(vars(position), sums={})
        torch.save({"position": fields, **content}, temporary / STATE_FILE)
    for old in [path for path in saved_states(folder) if path <= target][keep:]:
        files.remove_folder(old, [STATE_FILE])


def load_state(path: Path) -> tuple[Position, dict[str, Any]]:
    """Read one of `saved_states`. A damaged file may raise an exception of any type."""
    if files.is_damaged(path / STATE_FILE, "state"):
        raise ValueError("the file has changed since it was written")
    content = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
    position = Position(**content.pop("position"))
    for name, default in vars(Position()).items():
        if not isinstance(getattr(position, name), type(default)):
            raise TypeError(f"{name} is {getattr(position, name)!r}")
    return position, content


# Small files ----------------------------------------------------------------------------------------------------------


def write_config(folder: Path, options: dict[str, Any]) -> None:
    """Write config.yaml with every option of the run; it can be used as a recipe to repeat the run."""
    if _read_config(folder) != options:
        with atomic_write(folder / CONFIG_FILE, KIND) as path:
            path.write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write metrics.csv with one row per finished epoch."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(folder / "metrics.csv", KIND) as path:
        text = csv_text([names, *([row.get(name) for name in names] for row in rows)])
        path.write_text(text, encoding="utf-8")


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json with the results of the run."""
    with atomic_write(folder / "summary.json", KIND) as path:
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        # Bytes in file names that are not valid UTF-8 become JSON escapes.
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
