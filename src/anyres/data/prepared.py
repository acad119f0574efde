"""Items decoded and resized in worker processes, in their order: the inputs of predictions."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from anyres.data.base import Item
from anyres.data.decode import BadImage
from anyres.data.loading import data_loader
from anyres.data.samples import EvalSample, EvalTransform
from anyres.errors import UserError

TOGETHER = 4
"""Items that a worker process prepares at a time. Each worker holds two lots of them, so memory is bounded."""


class _Lots:
    """Items in lots; those that were handed out are remembered in `given` until their samples are back."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.items = items
        self.given: deque[list[Item]] = deque()

    def __iter__(self) -> Iterator[list[Item]]:
        items = iter(self.items)
        while lot := list(islice(items, TOGETHER)):
            self.given.append(lot)
            yield lot


class _Samples(Dataset[Any]):
    def __init__(self, transform: EvalTransform) -> None:
        self.transform = transform

    def __getitem__(self, lot: list[Item]) -> list[EvalSample | BadImage | UserError]:
        return [self._sample(item) for item in lot]

    def _sample(self, item: Item) -> EvalSample | BadImage | UserError:
        """Return errors instead of raising them: raised in a worker, they would arrive wrapped in a traceback."""
        try:
            sample = self.transform.prepare(item)
        except (BadImage, UserError) as error:
            return error
        # Tensors travel in shared memory. Arrays would fill the pipe, on which a worker whose main process was killed
        # would then wait forever.
        return _converted(sample, torch.tensor) if get_worker_info() else sample


def _converted(sample: EvalSample, convert: Callable[[Any], Any]) -> EvalSample:
    views = sample.pixels
    return sample._replace(pixels=list(map(convert, views)) if isinstance(views, list) else convert(views))


def prepared(
    transform: EvalTransform, items: Iterable[Item], workers: int = 0
) -> Iterator[tuple[Item, EvalSample | BadImage]]:
    """Yield each item with its sample, or with the reason why it cannot be read. Items are taken as they are needed.

    Raises UserError for what the user has to fix, such as an unknown bit depth.
    """
    lots = _Lots(items)
    for samples in data_loader(_Samples(transform), lots, workers, pin_memory=False, persistent=False):
        for item, sample in zip(lots.given.popleft(), samples, strict=True):
            if isinstance(sample, UserError):
                raise sample
            if workers and isinstance(sample, EvalSample):
                # Copied, because every tensor in shared memory takes a file descriptor.
                sample = _converted(sample, lambda view: view.numpy().copy())
            yield item, sample
