"""Batches for evaluation, in the order of the source."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from anyres.data.base import Item, MapSource, Source, StreamSource
from anyres.data.decode import BadImage
from anyres.data.kept import KeptImages
from anyres.data.loading import data_loader
from anyres.data.samples import EvalBatch, EvalTransform, prepare_batches
from anyres.errors import UserError

logger = logging.getLogger(__name__)


class _Task(NamedTuple):
    """What makes a batch: items of a stream, or indices of a source with indices."""

    start: int
    """Place of the first one in the pass over all processes."""
    step: int
    """From one to the next."""
    images: Sequence[int | Item]


class _EvalBatches(Dataset[Any]):
    def __init__(self, source: Source, transform: EvalTransform, kept: KeptImages | None) -> None:
        self.source = source if isinstance(source, MapSource) else None
        self.transform = transform
        self.kept = kept

    def __getitem__(self, task: _Task) -> tuple[list[EvalBatch], list[BadImage]] | UserError:
        """Return the batches and the images that could not be read.

        A UserError is returned rather than raised: raised in a worker, it would arrive wrapped in a traceback.
        """
        try:
            batches, bad = prepare_batches(self.transform, map(self._item, task.images))
        except UserError as error:
            return error
        placed = [batch._replace(rows=[task.start + row * task.step for row in batch.rows]) for batch in batches]
        return placed, list(bad.values())

    def _item(self, image: int | Item) -> Item:
        if not isinstance(image, int):
            return image
        assert self.source is not None
        return self.source.item(image) if self.kept is None else self.kept.item(self.source, image)


class _EvalTasks:
    def __init__(
        self, source: Source, batch_size: int, rank: int, world: int, indices: Sequence[int] | None = None
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.indices = indices

    def __iter__(self) -> Iterator[_Task]:
        images: Iterator[Any]
        if isinstance(self.source, StreamSource):
            images = self.source.items(None, 0, self.rank, self.world)
        else:
            assert isinstance(self.source, MapSource)
            chosen = range(len(self.source)) if self.indices is None else self.indices
            images = iter(chosen[self.rank :: self.world])
        start = self.rank
        while batch := list(islice(images, self.batch_size)):
            yield _Task(start, self.world, batch)
            start += len(batch) * self.world


class EvalLoader:
    """Evaluation batches in the order of the source: `batch_size` items at a time, divided by shape.

    Rank r of `world` gets every `world`-th image. `rows` of the batches are places among the images of all ranks.
    Unreadable images are left out, logged, and listed in `bad` for the last pass. Problems that the user has to fix,
    such as a mask value that means nothing, raise UserError.

    Args:
        indices: those of the items to take of a source that has indices; all by default.
        kept: decoded images of earlier passes, used and added to if there are no `workers`.
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
        indices: Sequence[int] | None = None,
        kept: KeptImages | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} must be at least 1")
        images = range(len(source)) if isinstance(source, MapSource) else None
        self.images = None if images is None else len((images if indices is None else indices)[rank::world])
        self.bad: list[BadImage] = []
        tasks = _EvalTasks(source, batch_size, rank, world, indices)
        batches = _EvalBatches(source, transform, None if workers else kept)
        self._loader = data_loader(batches, tasks, workers, pin_memory, persistent=False)

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
