"""Code shared by the training and evaluation loaders: the protocol of training views, and the worker processes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from anyres.data.base import Item
from anyres.errors import UserError
from anyres.shapes import Size

MAX_WORKERS = 1024
"""More than any machine has processors to run; each takes some hundred megabytes."""


class Views(Protocol):
    """A train transform: how items become training views. Must be picklable, because it runs in the workers."""

    def augment(self, item: Item, sizes: Sequence[Size], rng: random.Random) -> Any:
        """Decode an item once and draw its views at `sizes` (large to small) from `rng`. Raises BadImage."""

    def collate(self, items: Sequence[Item], samples: Sequence[Any], sizes: Sequence[Size]) -> tuple[list[Any], Any]:
        """Collate items and the results of `augment` into (views, targets), lists with one entry per size."""


def _as_is(batch: Any) -> Any:
    return batch


def data_loader(batches: Dataset[Any], tasks: Any, workers: int, pin_memory: bool, persistent: bool) -> DataLoader[Any]:
    """Return a DataLoader that turns each element of `tasks` into one batch, in order."""
    if not 0 <= workers <= MAX_WORKERS:
        raise UserError(f"workers {workers} must be between 0 (load in the main process) and {MAX_WORKERS}")
    return DataLoader(
        batches,
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        persistent_workers=persistent and workers > 0,
        # Without a generator of its own, starting an epoch would draw from the caller's global generator.
        generator=torch.Generator(),
    )
