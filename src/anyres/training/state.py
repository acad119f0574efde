"""What a run needs to continue as if it had never stopped, and how it gets to disk and back.

A state is a folder `state/step_000000123_000004/` (optimiser steps, epochs) that appears whole or not at all. It holds
everything: weights, optimiser, moving average, gradient scaler, the random states of every process, the position in the
data, the metrics of the epoch in progress and the finished rows of metrics.csv. That file and summary.json are written
from the state, never the other way round, so a kill between the two loses nothing and repeats nothing.
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
"""What the record of the folder calls `FILES` (`anyres.io.files`)."""


@dataclass
class Position:
    """Where a run is: small, plain values, saved with every state."""

    epoch: int = 0
    """Epochs finished, and so the number of the one in progress."""
    batch: int = 0
    """Batches of the epoch in progress that are used up."""
    updates: int = 0
    """Optimiser steps since the start."""
    sums: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """Metrics of the epoch in progress, of this process: name -> [sum (a tensor on the device), count]. Saved apart."""
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """One row of metrics.csv for every finished epoch."""
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    """Best `acc1` and its epoch, for the weights ("best") and their moving average ("best_ema")."""
    bad: dict[str, str] = dataclasses.field(default_factory=dict)
    """Unreadable images met so far: name -> reason."""
    run_id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(6))
    """Under which trackers know the run."""
    seconds: float = 0.0
    """Training time so far, over all starts."""
    epoch_seconds: float = 0.0
    """Training time of the epoch in progress."""
    waited: float = 0.0
    """That part of it in which the training waited for data."""


def rng_state() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, as values that `torch.load(weights_only=True)` accepts."""
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
    """Raises UserError if a run with these options would replace or delete something that anyres did not write."""
    if not files.is_recorded(folder, KIND) and _lacks_record(folder):
        files.adopt(folder, KIND, FILES)
    # An edited config.yaml that says what the run is to do stays as it is.
    files.check_files(folder, KIND, FILES if _read_config(folder) != options else FILES[1:])
    for name in FOLDERS:
        hub.check_target(folder / name)
    if not files.is_recorded(folder, KIND):
        for name in ("state", "tensorboard"):
            if os.path.lexists(folder / name) and not _is_empty(folder / name):
                raise UserError(
                    f"{folder / name} exists, and it belongs to no run of anyres: move it away or choose another output"
                )


def _lacks_record(folder: Path) -> bool:
    """Whether version 0.1, which kept no record, began a run in the folder."""
    options = _read_config(folder)
    return bool(saved_states(folder)) and {"model", "data", "output"} <= options.keys()


def _read_config(folder: Path) -> dict[str, Any]:
    """The options in config.yaml, in the spelling of today; none if it says nothing."""
    try:
        found = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # any config.yaml at all
        return {}
    return RunConfig.translated(found) if isinstance(found, dict) else {}


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def prepare_folder(folder: Path) -> None:
    """Create the run folder and put right what a kill left in it. For the holder of its lock."""
    with files.explained(folder):
        (folder / "state").mkdir(parents=True, exist_ok=True)
        for name in FOLDERS:
            files.recover_folder(folder / name, hub.KIND, hub.NAMES)
        files.remove_temporary(folder / "state")


def clear_run(folder: Path) -> None:
    """Remove an earlier run's results, its states first: after a kill in between there is nothing to resume."""
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
    """States in a run folder, newest first."""
    states = (path.parent for path in (folder / "state").glob(f"step_*/{STATE_FILE}"))
    return sorted((path for path in states if re.fullmatch(r"step_\d{9}_\d{6}", path.name)), reverse=True)


def save_state(folder: Path, position: Position, content: dict[str, Any], keep: int) -> None:
    """Write a state and remove all but the newest `keep` up to it."""
    target = folder / "state" / f"step_{position.updates:09d}_{position.epoch:06d}"
    if target.exists():  # ours by its name, even if it could not be read
        files.adopt(target, "state", [STATE_FILE])
    with atomic_folder(target, "state", [STATE_FILE]) as temporary:
        fields = dict(vars(position), sums={})
        torch.save({"position": fields, **content}, temporary / STATE_FILE)
    for old in [path for path in saved_states(folder) if path <= target][keep:]:
        files.remove_folder(old, [STATE_FILE])


def load_state(path: Path) -> tuple[Position, dict[str, Any]]:
    """Read one of `saved_states`. Raises whatever a damaged file leads to."""
    if files.is_damaged(path / STATE_FILE, "state"):
        raise ValueError("the file is not as it was written")
    content = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
    position = Position(**content.pop("position"))
    for name, default in vars(Position()).items():
        if not isinstance(getattr(position, name), type(default)):
            raise TypeError(f"{name} is {getattr(position, name)!r}")
    return position, content


# Small files ----------------------------------------------------------------------------------------------------------


def write_config(folder: Path, options: dict[str, Any]) -> None:
    """config.yaml: every option of the run, as a recipe that repeats it."""
    if _read_config(folder) != options:
        with atomic_write(folder / CONFIG_FILE, KIND) as path:
            path.write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    """metrics.csv: one row per finished epoch."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(folder / "metrics.csv", KIND) as path:
        text = csv_text([names, *([row.get(name) for name in names] for row in rows)])
        path.write_text(text, encoding="utf-8")


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """summary.json: what came of the run."""
    with atomic_write(folder / "summary.json", KIND) as path:
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        # Bytes of a file name that are no UTF-8 become escapes, which JSON reads back.
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
