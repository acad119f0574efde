"""A run small enough to be repeated many times: a network of 8,000 parameters on 48 digits."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from anyres.training import load_config, train
from anyres.training.config import RunConfig

SMALL = {
    "model": "resformer_tiny",
    "model_args": {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4},
    "data": "digits",
    "sizes": [16, 12, 8],
    "epochs": 2,
    "batch_size": 16,
    "epoch_size": 48,
    "fraction": 1.0,
    "eval_every": 2,
    "eval_batch_size": 360,
    "lr": 2e-3,
    "warmup_epochs": 1,
    "drop_path": 0.2,
    "auto_augment": None,
    "precision": "float32",
    "device": "cpu",
    "progress": False,
    "workers": 0,
    "log_every": 1,
}

MEASURED = ("images_per_second", "views_per_second", "seconds", "data_wait", "peak_resident_gib")


def small_config(output: Path, **changes: Any) -> RunConfig:
    return load_config({**SMALL, "output": str(output)}, **changes)


def train_small(options: dict[str, Any]) -> None:
    """Entry of processes that tests start and kill."""
    torch.set_num_threads(1)
    train(load_config(options))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without what depends on the clock and the memory."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in MEASURED} for row in csv.DictReader(file)]


SAME_EVERYWHERE: dict[str, Any] = {"drop_path": 0.0, "accumulation": 2, "clip_grad": 0.5, "eval_every": 1}
"""Without drop path nothing random depends on the process."""
