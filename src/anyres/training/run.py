"""The objects of a run in progress, and its result."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from anyres.data import TrainLoader
from anyres.tasks import Task
from anyres.tasks.objective import Objective
from anyres.training.config import RunConfig
from anyres.training.state import Position


@dataclass
class Run:
    """The objects and progress of a run."""

    config: RunConfig
    task: Task
    accelerator: Accelerator
    folder: Path
    model: Any
    """The network without wrappers; under FSDP2 its parameters are sharded."""
    plain: Any
    """The network with unsharded parameters, for validation and saving; `model` itself except under FSDP2."""
    forward: nn.Module
    """`TrainForward`, wrapped by DDP or FSDP2."""
    optimizer: Any
    ema: ModelEmaV3 | None
    loader: TrainLoader
    objective: Objective
    val_source: Any
    batches_per_epoch: int
    signals: list[int] = field(default_factory=list)
    """SIGINT and SIGTERM received so far."""
    position: Position = field(default_factory=Position)
    started: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)
    grad_norm: Tensor = field(default_factory=lambda: torch.tensor(math.nan))
    """Gradient norm of the latest step before clipping, a scalar on the device."""
    status: str = ""
    """The reason why the run ended; empty while it is in progress."""


@dataclass(frozen=True)
class RunResult:
    """The result of a run."""

    folder: Path
    status: str
    """finished, early stop, time limit or signal; after the last two, the run can be resumed."""
    score: float | None
    """Validation score of `folder / "best"` in percent, averaged over the training sizes (top-1, mIoU or AP)."""
    rows: list[dict[str, Any]]
    """The rows of metrics.csv."""
    bad_images: dict[str, str]
    """Unreadable images that were skipped: name -> reason."""
