"""Accuracy of video classifiers."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from anyres.data.base import MapSource
from anyres.data.config import DataConfig
from anyres.data.samples import EvalBatch
from anyres.tasks.accuracy import Accuracy
from anyres.tasks.scores import Measured

logger = logging.getLogger(__name__)


class ClipAccuracy(Accuracy):
    """`Accuracy` that also logs the number of videos shorter than a clip."""

    def __init__(self, config: DataConfig, source: MapSource) -> None:
        super().__init__(config, source)
        self.short = 0

    def update(self, outputs: Tensor, batch: EvalBatch) -> None:
        super().update(outputs, batch)
        self.short += batch.short

    def share(self) -> Any:
        return *super().share(), self.short

    def compute(self, shares: list[Any], count: int) -> Measured:
        if short := sum(share[-1] for share in shares):
            logger.warning("%d videos of %s are shorter than a clip: their last frame is repeated", short, self.source)
        return super().compute([share[:-1] for share in shares], count)
