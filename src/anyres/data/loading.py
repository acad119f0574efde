"""What the loaders of training and evaluation stand on: how a kind of data is prepared, and the worker processes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from anyres.data.base import Item
from anyres.errors import UserError
from anyres.shapes import Size


class Views(Protocol):
    """How a kind of data becomes training views. Must be picklable; runs in the workers."""

    def augment(self, item: Item, sizes: Sequence[Size], rng: random.Random) -> Any:
        """Decode an item once and draw its views at `sizes` (large to small) from `rng`. Raises BadImage."""

    def collate(self, items: Sequence[Item], samples: Sequence[Any], sizes: Sequence[Size]) -> tuple[list[Any], Any]:
        """Items and what `augment` made of them → (views, targets), lists with one entry for each size."""


def _as_is(batch: Any) -> Any:
    return batch


def data_loader(batches: Dataset[Any], tasks: Any, workers: int, pin_memory: bool, persistent: bool) -> DataLoader[Any]:
    """Each element of `tasks` becomes one batch, in order."""
    if workers < 0:
        raise UserError(f"workers {workers} must be 0 (load in the main process) or more")
    return DataLoader(
        batches,
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        persistent_workers=persistent and workers > 0,
        # A generator of its own: without one, starting an epoch draws from the caller's global generator.
        generator=torch.Generator(),
    )
