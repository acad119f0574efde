"""Sources of one kind, and loaders of classified images, with the source's statistics unless told otherwise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from anyres.data import (
    Augmentation,
    EvalLoader,
    ImageTest,
    ImageViews,
    MapSource,
    SizeSchedule,
    Source,
    StreamSource,
    TrainLoader,
    open_source,
)
from tests.typed import as_a


def open_map(spec: str | os.PathLike[str], split: str = "train", **options: Any) -> MapSource:
    return as_a(MapSource, open_source(spec, split, **options))


def open_stream(spec: str, split: str = "train", **options: Any) -> StreamSource:
    return as_a(StreamSource, open_source(spec, split, **options))


def train_loader(
    source: Source, schedule: SizeSchedule, augmentation: Augmentation, batch_size: int, **options: Any
) -> TrainLoader:
    return TrainLoader(source, schedule, ImageViews(augmentation, source.mean, source.std), batch_size, **options)


def eval_loader(
    source: Source,
    size: tuple[int, int] | Sequence[tuple[int, int]],
    batch_size: int,
    workers: int = 0,
    *,
    rank: int = 0,
    world: int = 1,
    **settings: Any,
) -> EvalLoader:
    own = {"mean": source.mean, "std": source.std, "crop_pct": source.crop_pct}
    return EvalLoader(source, ImageTest(size, **{**own, **settings}), batch_size, workers, rank=rank, world=world)
