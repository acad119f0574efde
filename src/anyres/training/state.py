"""What a run needs to continue as if it had never stopped, and how it gets to disk and back.

A state is a folder `state/step_000000123_000004/` (optimiser steps, epochs) that appears whole or not at all. It holds
everything: weights, optimiser, moving average, gradient scaler, the random states of every process, the position in the
data, the metrics of the epoch in progress and the finished rows of metrics.csv. That file and summary.json are written
from the state, never the other way round, so a kill between the two loses nothing and repeats nothing.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import logging
import pickle
import random
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError

from anyres.errors import UserError
from anyres.files import atomic_folder, atomic_write, recover_folder

logger = logging.getLogger(__name__)

FOLDERS = ("best", "best_ema", "last", "last_ema")
FILES = ("config.yaml", "metrics.csv", "summary.json")
STATE_FILE = "state.pt"


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


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say in one sentence why a file could not be written (full disk, no permission, a name too long, ...)."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or _is_full(path):
            reason = "the disk is full"
        elif isinstance(error, OSError):
            reason = error.strerror or str(error)
        else:
            raise
        raise UserError(f"cannot write {path}: {reason}; make room or choose another output folder") from error


def _is_full(path: Path) -> bool:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free < 1 << 20


def prepare_folder(folder: Path) -> None:
    """Create the run folder and put right what a kill left in it."""
    with explained(folder):
        (folder / "state").mkdir(parents=True, exist_ok=True)
        for name in FOLDERS:
            recover_folder(folder / name)
        # Names of temporary files and folders as `anyres.files` makes them: .<name>.<random>.tmp[suffix]
        for name in FOLDERS:
            _remove(folder.glob(f".{name}.*.tmp"))
        for name in FILES:
            stem, suffix = name.split(".")
            _remove(folder.glob(f".{stem}.*.tmp.{suffix}"))
        _remove((folder / "state").glob(".step_*"))


def clear_run(folder: Path) -> None:
    """Remove an earlier run's results, its states first: after a kill in between there is nothing to resume."""
    for name in ("state", *FOLDERS, "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in FILES[1:]:
        (folder / name).unlink(missing_ok=True)


def _remove(paths: Iterator[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def saved_states(folder: Path) -> list[Path]:
    """States in a run folder, newest first."""
    return sorted((folder / "state").glob("step_*"), reverse=True)


def save_state(folder: Path, position: Position, content: dict[str, Any], keep: int) -> None:
    """Write a state and remove all but the newest `keep`."""
    target = folder / "state" / f"step_{position.updates:09d}_{position.epoch:06d}"
    # Twice: torch.save hides the reason of a failed write, and a full disk shows only while the failed file is there.
    with explained(target), atomic_folder(target) as temporary, explained(target):
        fields = dict(vars(position), sums={})
        torch.save({"position": fields, **content}, temporary / STATE_FILE)
    for old in saved_states(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path) -> tuple[Position, dict[str, Any]] | None:
    """The newest readable state of a run, or None if it has none.

    Raises:
        UserError: there are states but none can be read.
    """
    states = saved_states(folder)
    for path in states:
        try:
            content = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            logger.warning("%s cannot be read (%s); trying the one before", path, str(error).splitlines()[:1])
            continue
        return Position(**content.pop("position")), content
    if states:
        raise UserError(f"no state in {folder / 'state'} can be read; remove that folder to start over, or restore it")
    return None


def write_config(folder: Path, options: dict[str, Any]) -> None:
    """config.yaml: every option of the run, as a recipe that repeats it."""
    with explained(folder / "config.yaml"), atomic_write(folder / "config.yaml") as path:
        path.write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    """metrics.csv: one row per finished epoch."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (
        explained(folder / "metrics.csv"),
        atomic_write(folder / "metrics.csv") as path,
        path.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """summary.json: what came of the run."""
    with explained(folder / "summary.json"), atomic_write(folder / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
