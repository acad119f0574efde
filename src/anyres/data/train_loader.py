"""The training loader: batches of training views that are the same for any number of workers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data._utils.pin_memory import pin_memory

from anyres.data.base import Item, MapSource, Source, StreamSource
from anyres.data.decode import BadImage
from anyres.data.loading import Views, data_loader
from anyres.data.schedule import SizeSchedule
from anyres.data.seeding import generator, kept_globals
from anyres.errors import UserError
from anyres.shapes import Size

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 100
REPEATED_MULTIPLE = 256


@dataclass
class Batch:
    """One rank's share of a step: a view and a target for each of `sizes`, from large to small.

    A view of images is (B, C, H, W) float32, and a view of clips is (B, C, T, H, W). In classification, a target is the
    labels (B,). `bad` lists the images that could not be read and were replaced by others. `step` counts within the
    epoch.
    """

    views: list[Any]
    targets: list[Any]
    names: list[str]
    sizes: list[Size]
    bad: list[BadImage] = field(default_factory=list)
    epoch: int = 0
    step: int = 0

    def pin_memory(self) -> Batch:
        """Return the batch in pinned (page-locked) memory; called by the DataLoader."""
        return replace(self, views=pin_memory(self.views), targets=pin_memory(self.targets))


class _Slot(NamedTuple):
    position: int  # within the epoch; the key of the random draws
    image: int | Item  # an index for map sources, so that workers read the file; the item itself for streams


class _Task(NamedTuple):
    """All that a worker needs to make a batch."""

    epoch: int
    step: int
    sizes: list[Size]
    slots: list[_Slot]


def deal(batch_size: int, rank: int, world: int) -> np.ndarray:
    """Return the positions in the global batch that `rank` gets.

    The pairs (i, G-1-i) of a global batch of G are dealt to the ranks in turn and kept together. Mixing pairs each
    image with its mirror image in the rank's batch, so the same pairs are mixed for any number of ranks.
    """
    first = np.arange(rank, batch_size // 2, world)
    middle = [batch_size // 2] if batch_size % 2 else []  # only with one rank
    return np.concatenate([first, np.array(middle, dtype=first.dtype), (batch_size - 1 - first)[::-1]])


@lru_cache(maxsize=2)
def _order(images: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(images)


def _name_bad(bad: Sequence[str], shown: int = 3) -> str:
    return ", ".join(bad[:shown]) + (f" and {len(bad) - shown} more" if len(bad) > shown else "")


class _TrainBatches(Dataset[Any]):
    """Makes the batch of a task; runs in the workers.

    A UserError is returned rather than raised: raised in a worker, it would arrive wrapped in a traceback.
    """

    def __init__(self, source: Source, views: Views, seed: int, repeats: int) -> None:
        self.source = source if isinstance(source, MapSource) else None
        self.views = views
        self.seed = seed
        self.repeats = repeats

    def __getitem__(self, task: _Task) -> Batch | UserError:
        try:
            # Without workers, the global generators belong to the caller and must be restored.
            with kept_globals() if get_worker_info() is None else nullcontext():
                return self._batch(task)
        except UserError as error:
            return error

    def _batch(self, task: _Task) -> Batch:
        bad: list[BadImage] = []
        items: list[Item] = []
        samples: list[Any] = []
        for place in range(len(task.slots)):
            item, sample = self._sample(task, place, bad)
            items.append(item)
            samples.append(sample)
        views, targets = self.views.collate(items, samples, task.sizes)
        return Batch(views, targets, [item.name for item in items], task.sizes, bad, task.epoch, task.step)

    def _sample(self, task: _Task, place: int, bad: list[BadImage]) -> tuple[Item, Any]:
        """Return the augmented image of a slot, or the next readable one, augmented with the slot's random draws."""
        position = task.slots[place].position
        for item in islice(self._candidates(task, place), MAX_ATTEMPTS):
            try:
                rng = generator("sample", self.seed, task.epoch, position)
                return item, self.views.augment(item, task.sizes, rng)
            except BadImage as error:
                bad.append(error)
        last = bad[-1]
        raise UserError(
            f"no readable image was found after {last.name} ({last.reason}): repair or remove the unreadable images"
        )

    def _candidates(self, task: _Task, place: int) -> Iterator[Item]:
        """Yield the image of a slot, then the ones after it: in shuffled order, or within the batch for a stream."""
        position, image = task.slots[place]
        if self.source is None:
            for later in range(len(task.slots)):
                follower = task.slots[(place + later) % len(task.slots)].image
                assert isinstance(follower, Item)
                yield follower
            return
        assert isinstance(image, int)
        yield self.source.item(image)
        order = _order(len(self.source), self.seed, task.epoch)
        for later in range(1, len(order)):
            yield self.source.item(int(order[(position // self.repeats + later) % len(order)]))


class _TrainTasks:
    """The tasks of an epoch from a given step on; the DataLoader iterates over them in the main process."""

    def __init__(
        self,
        source: Source,
        schedule: SizeSchedule,
        batch_size: int,
        steps: int,
        seed: int,
        rank: int,
        world: int,
        repeats: int,
    ) -> None:
        self.source = source
        self.schedule = schedule
        self.seed = seed
        self.rank = rank
        self.world = world
        self.repeats = repeats
        self.batch_size = batch_size  # over all ranks
        self.steps = steps
        self.epoch = 0
        self.start = 0

    def positions(self, step: int) -> np.ndarray:
        """Return the positions, within the epoch, of this rank's images in a step."""
        return step * self.batch_size + deal(self.batch_size, self.rank, self.world)

    def indices(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """Return the images at these positions; every image of the shuffled list occurs `repeats` times in a row."""
        assert isinstance(self.source, MapSource)
        chosen: np.ndarray = _order(len(self.source), self.seed, epoch)[positions // self.repeats]
        return chosen

    def __iter__(self) -> Iterator[_Task]:
        epoch, steps = self.epoch, self.steps
        items = self._stream(epoch) if isinstance(self.source, StreamSource) else None
        for step in range(self.start, steps):
            positions = self.positions(step)
            images: Sequence[int | Item]
            if items is None:
                images = [int(index) for index in self.indices(positions, epoch)]
            else:
                images = list(islice(items, len(positions)))
            slots = [_Slot(int(position), image) for position, image in zip(positions, images, strict=True)]
            yield _Task(epoch, step, self.schedule.sizes(epoch, epoch * steps + step), slots)

    def _stream(self, epoch: int) -> Iterator[Item]:
        """Read the rank's share repeatedly (shares may be unequal), skipping the items before the first step."""
        skipped = sum(len(self.positions(step)) for step in range(self.start))
        return islice(_endless(self.source, epoch, self.seed, self.rank, self.world), skipped, None)


def _endless(source: Source, epoch: int, seed: int, rank: int, world: int) -> Iterator[Item]:
    assert isinstance(source, StreamSource)
    for again in count():
        item = None
        for item in source.items(epoch, seed + (again << 32), rank, world):
            yield item
        if item is None:
            raise UserError(
                f"{source.name} holds no images for rank {rank} of {world}: use fewer processes or another split"
            )


class TrainLoader:
    """Training batches of all `views`, shuffled by (seed, epoch) and shown at the sizes of the schedule.

    `batch_size` is that of a whole step, which `world` ranks share; with several ranks it must be a multiple of 2 x
    `world`. Each rank gets whole mirror pairs (see `deal`), and for map sources a step is the same for any `world`.
    (Streams give each rank its own shards, so their steps depend on `world`, but not on `workers`.) All random draws
    depend only on (seed, epoch, position in the epoch). The number of workers and resuming within an epoch therefore do
    not change a single bit, and the global random generators stay untouched.

    `repeats` r shows each image of the shuffled list r times in a row and keeps the first floor(n/256)·256 of the r·n
    entries (all n if n < 256). This is repeated augmentation (Hoffer et al., CVPR 2020) as in DeiT (Touvron et al.,
    ICML 2021, section 6). The incomplete last batch of an epoch is dropped. `epoch_size` is the number of images per
    epoch: it is required for streams of unknown size, and shortens the epoch of other sources.

    An unreadable image is replaced by the next readable one, logged once, and collected in `bad` ({name: reason}, for
    this rank's images). UserError is raised as soon as more than `max_bad_fraction` of the distinct images that this
    rank plans for an epoch are bad.
    """

    def __init__(
        self,
        source: Source,
        schedule: SizeSchedule,
        views: Views,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        repeats: int = 1,
        epoch_size: int | None = None,
        max_bad_fraction: float = 0.01,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1 or (world > 1 and batch_size % (2 * world)):
            rule = "at least 1" if world == 1 else f"a multiple of {2 * world}, twice the number of processes"
            raise UserError(f"batch_size {batch_size} (of the whole step) must be {rule}")
        if not 0 <= rank < world:
            raise UserError(f"rank {rank} must be from 0 to {world - 1}")
        if seed < 0:
            raise UserError(f"seed {seed} must be 0 or more")
        if repeats < 1:
            raise UserError(f"repeats {repeats} must be at least 1")
        if repeats > 1 and isinstance(source, StreamSource):
            raise UserError(
                f"repeats {repeats} needs a source with random access, and {source.name} is a stream: use 1"
            )
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction {max_bad_fraction} must be from 0 to 1")
        images = _epoch_images(source, repeats, epoch_size)
        self.source = source
        self.epoch_size = images
        self.max_bad_fraction = max_bad_fraction
        self.bad: dict[str, str] = {}
        self.steps_per_epoch = images // batch_size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"an epoch of {source.name} has {images} images, fewer than batch_size {batch_size}: lower it"
            )
        self._tasks = _TrainTasks(source, schedule, batch_size, self.steps_per_epoch, seed, rank, world, repeats)
        batches = _TrainBatches(source, views, seed, repeats)
        self._new_loader = partial(data_loader, batches, self._tasks, workers, pin_memory, persistent=True)
        self._loader = self._new_loader()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over the steps of an epoch from `start_step` on; earlier steps are skipped without decoding.

        Only one epoch can be iterated at a time. The share of bad images is counted from the start of this call. Raises
        UserError if there are too many.
        """
        tasks = self._tasks
        tasks.epoch, tasks.start = epoch, start_step
        planned = self._planned_images(epoch)
        bad: dict[str, str] = {}
        problem = None
        for batch in self._loader:
            problem = str(batch) if isinstance(batch, UserError) else self._note_bad(batch, bad, planned)
            if problem is not None:
                break
            yield batch
        if problem is not None:
            # A new loader ends the old one's workers now; otherwise a traceback could keep them alive for seconds.
            self._loader = self._new_loader()
            raise UserError(problem)

    def _note_bad(self, batch: Batch, bad: dict[str, str], planned: int) -> str | None:
        """Log and collect the bad images of a batch; return an error message if the epoch has too many."""
        for error in batch.bad:
            if error.name not in self.bad:
                logger.warning("skipped %s", error)
            bad[error.name] = self.bad[error.name] = error.reason
        if len(bad) <= self.max_bad_fraction * planned:
            return None
        names = _name_bad([f"{name} ({reason})" for name, reason in bad.items()])
        return (
            f"{len(bad)} of the {planned} images of epoch {batch.epoch + 1} cannot be read, more than the limit of "
            f"{self.max_bad_fraction:.3g} (max_bad_fraction): {names}; repair or remove them, or raise the limit"
        )

    def _planned_images(self, epoch: int) -> int:
        positions = np.concatenate([self._tasks.positions(step) for step in range(self.steps_per_epoch)])
        return (
            len(positions)
            if isinstance(self.source, StreamSource)
            else len(np.unique(self._tasks.indices(positions, epoch)))
        )


def _epoch_images(source: Source, repeats: int, epoch_size: int | None) -> int:
    if epoch_size is not None and epoch_size < 1:
        raise UserError(f"epoch_size {epoch_size} must be at least 1")
    if isinstance(source, StreamSource):
        size = epoch_size or source.size
        if size is None:
            raise UserError(
                f"the number of images in {source.name} is not known: set epoch_size, the images of one epoch"
            )
        return size
    assert isinstance(source, MapSource)
    images = len(source)
    if repeats > 1 and images >= REPEATED_MULTIPLE:
        images = images // REPEATED_MULTIPLE * REPEATED_MULTIPLE
    if epoch_size is not None and epoch_size > images:
        raise UserError(f"epoch_size {epoch_size} is more than the {images} images of {source.name}: lower it")
    return epoch_size or images
