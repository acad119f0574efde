"""Accuracy of a video classifier on a source of clips at one input size."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from anyres.data import EvalLoader, MapSource
from anyres.data.clips import Sampling
from anyres.data.video_views import ClipBatch, ClipTest
from anyres.evaluation.accuracy import process, tally
from anyres.evaluation.results import Measured
from anyres.inference.preparation import preparation_for, sampling_of
from anyres.shapes import Size

logger = logging.getLogger(__name__)


def evaluate_video(
    model: nn.Module,
    source: MapSource,
    size: Size,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    *,
    workers: int = 0,
    clips: int = 1,
    crops: int = 1,
    sampling: Sampling | None = None,
    crop_pct: float | None = None,
) -> Measured:
    """Classify every video of `source` at `size` (height, width) in inference mode, from `clips` times `crops` views:
    scores "top1", "top5" (with more than five classes) and "loss" (nats).

    The softmax scores of a video's views are summed; the loss is the cross-entropy of their mean. See `ClipTest` for
    the views: `sampling` is that of `sampling_of` and `crop_pct` the model's own (1 with three crops) unless given.
    Videos shorter than a clip are counted in the log. Everything else as in `evaluation.accuracy.evaluate`.
    """
    device = torch.device(device)
    way = preparation_for(model, source)
    if crop_pct is None:
        crop_pct = way.crop_pct if crops == 1 else 1.0
    sampling = sampling or sampling_of(model)
    test = ClipTest(size, sampling, way.mean, way.std, clips, crops, crop_pct, way.interpolation)
    rank, world = process()
    loader = EvalLoader(source, test, batch_size, workers, rank=rank, world=world)
    short = 0

    def logits_of(batch: ClipBatch) -> Tensor:
        nonlocal short
        short += batch.short
        views = batch.pixels.unbind(1)
        logits = torch.stack([model(test.view(pixels).to(device)) for pixels in views])
        return logits.float().log_softmax(-1).logsumexp(0) - math.log(len(views))

    measured = tally(model, source, loader, logits_of, device, precision)
    if short:
        logger.warning("%d videos of %s are shorter than a clip: their last frame is repeated", short, source.name)
    return measured
