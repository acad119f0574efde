"""What is alive during a run, and what it returns."""

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
    """Everything that is alive during a run."""

    config: RunConfig
    task: Task
    accelerator: Accelerator
    folder: Path
    model: Any
    """The network without wrappers; under FSDP2 its parameters are sharded."""
    plain: Any
    """The network with whole parameters, to validate and save: `model` itself except under FSDP2."""
    forward: nn.Module
    """`TrainForward` as DDP or FSDP2 wrap it."""
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
    """Norm of the newest step's gradients before they were clipped, a scalar on the device."""
    status: str = ""
    """Why the run ended; empty while it goes on."""


@dataclass(frozen=True)
class RunResult:
    """What came of a run."""

    folder: Path
    status: str
    """finished, early stop, time limit or signal; after the last two, resume continues."""
    score: float | None
    """Best validation score in percent (the task's: top-1, mIoU, AP), the mean over the training sizes: that of
    `folder / "best"`."""
    rows: list[dict[str, Any]]
    """The rows of metrics.csv."""
    bad_images: dict[str, str]
    """Unreadable images that were skipped: name -> reason."""
