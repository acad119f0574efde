"""Batches for evaluation, in the order of the source."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import Dataset

from anyres.data.base import Item, MapSource, Source, StreamSource
from anyres.data.decode import BadImage
from anyres.data.loading import data_loader
from anyres.data.samples import EvalBatch, EvalTransform, prepare_batches
from anyres.errors import UserError

logger = logging.getLogger(__name__)


class _EvalBatches(Dataset[Any]):
    def __init__(self, source: Source, transform: EvalTransform) -> None:
        self.source = source if isinstance(source, MapSource) else None
        self.transform = transform

    def __getitem__(self, images: Sequence[int | Item]) -> tuple[list[EvalBatch], list[BadImage]] | UserError:
        """Return the batches and the images that could not be read.

        A UserError is returned rather than raised: raised in a worker, it would arrive wrapped in a traceback.
        """
        try:
            batches, bad = prepare_batches(self.transform, map(self._item, images))
            return batches, list(bad.values())
        except UserError as error:
            return error

    def _item(self, image: int | Item) -> Item:
        if isinstance(image, int):
            assert self.source is not None
            return self.source.item(image)
        return image


class _EvalTasks:
    def __init__(self, source: Source, batch_size: int, rank: int, world: int) -> None:
        self.source = source
        self.batch_size = batch_size
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[list[int] | list[Item]]:
        images: Iterator[Any]
        if isinstance(self.source, StreamSource):
            images = self.source.items(None, 0, self.rank, self.world)
        else:
            assert isinstance(self.source, MapSource)
            images = iter(range(self.rank, len(self.source), self.world))
        while batch := list(islice(images, self.batch_size)):
            yield batch


class EvalLoader:
    """Evaluation batches in the order of the source: `transform.collate` applied to `batch_size` items at a time.

    Rank r of `world` gets every `world`-th image. Unreadable images are left out, logged, and listed in `bad` for the
    last pass. Problems that the user has to fix, such as a mask value that means nothing, raise UserError.
    """

    def __init__(
        self,
        source: Source,
        transform: EvalTransform,
        batch_size: int,
        workers: int = 0,
        *,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} must be at least 1")
        self.images = len(range(rank, len(source), world)) if isinstance(source, MapSource) else None
        self.bad: list[BadImage] = []
        tasks = _EvalTasks(source, batch_size, rank, world)
        self._loader = data_loader(_EvalBatches(source, transform), tasks, workers, pin_memory, persistent=False)

    def __iter__(self) -> Iterator[EvalBatch]:
        self.bad = []
        for loaded in self._loader:
            if isinstance(loaded, UserError):
                raise loaded
            batches, bad = loaded
            for error in bad:
                logger.warning("skipped %s", error)
            self.bad.extend(bad)
            yield from batches
