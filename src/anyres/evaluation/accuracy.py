"""Accuracy of a classifier on a source of images at one input size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.data import EvalBatch, EvalLoader, ImageTest, Source
from anyres.errors import UserError
from anyres.evaluation.cost import precision_context
from anyres.evaluation.results import Measured
from anyres.inference.finite import check_outputs, check_weights
from anyres.inference.preparation import label_places, preparation_for
from anyres.shapes import Size

if TYPE_CHECKING:
    from PIL import Image


def evaluate(
    model: nn.Module,
    source: Source,
    size: Size,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    *,
    workers: int = 0,
) -> Measured:
    """Classify every image of `source` at `size` (height, width) in inference mode, with the preprocessing of
    `preparation_for`: scores "top1", "top5" (with more than five classes) and "loss" (mean cross-entropy, nats).

    `precision` "bfloat16" and "float16" run under autocast. Under torch.distributed every process takes its own
    share of the images and all return the sums; each image counts once. The model is moved to `device` and put back
    into its mode afterwards. Raises UserError when no image is readable, the classes do not fit the model's, or
    weights or logits are not finite.
    """
    device = torch.device(device)
    loader = _open_loader(model, source, size, batch_size, workers, *process())

    def logits_of(batch: EvalBatch) -> Tensor:
        return model(batch.views.to(device, non_blocking=True))

    return tally(model, source, loader, logits_of, device, precision)


def tally(
    model: nn.Module,
    source: Source,
    loader: EvalLoader,
    logits_of: Callable[[Any], Tensor],
    device: torch.device,
    precision: str,
) -> Measured:
    """The scores of `evaluate` over a loader whose batches have `labels`; `logits_of(batch)` has the model classify
    one, on `device`."""
    places = label_places(model, source)
    check_weights(model)
    was_training = model.training
    model = model.to(device).eval()
    sums: list[Tensor] = []
    count, classes = 0, 0
    try:
        with torch.inference_mode():
            for batch in loader:
                targets = places[batch.labels]
                with precision_context(precision, device):
                    logits = logits_of(batch)
                count, classes = count + len(targets), logits.shape[-1]
                if int(targets.max()) >= classes:
                    raise UserError(
                        f"label {int(targets.max())} of {source.name} is beyond the model's {classes} classes: "
                        "use the data set it was trained for"
                    )
                sums.append(
                    _score(logits.float(), targets.to(device))
                )  # summed at the end: no wait for the device here
    finally:
        model.train(was_training)
    totals = torch.stack(sums).cpu().double().sum(0).tolist() if sums else [0.0] * 4
    shares = _gather((*totals, count, classes, tuple(str(image) for image in loader.bad)))
    right1, right5, loss, lost, count = (sum(share[column] for share in shares) for column in range(5))
    classes = max(share[5] for share in shares)
    bad = tuple(name for share in shares for name in share[6])
    if not count:
        raise UserError(f"{source.name} has no readable image ({len(bad)} skipped): check the files")
    check_outputs(model, not lost, f"{int(lost)} of the {int(count)} items of {source.name}")
    top5 = {"top5": 100 * right5 / count} if classes > 5 else {}
    return Measured({"top1": 100 * right1 / count, **top5, "loss": loss / count}, int(count), bad)


def _score(logits: Tensor, targets: Tensor) -> Tensor:
    """(right in the first place, right in the first five, sum of the cross-entropy, rows that are not finite) of a
    batch."""
    hits = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == targets[:, None]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    lost = logits.isfinite().all(-1).logical_not().sum()
    return torch.stack([hits[:, 0].sum(), hits.any(-1).sum(), loss, lost])


def process() -> tuple[int, int]:
    """(rank, world size) of torch.distributed; (0, 1) without it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _gather(share: tuple[Any, ...]) -> list[Any]:
    world = process()[1]
    if world == 1:
        return [share]
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, share)
    return shares


def first_images(model: nn.Module, source: Source, size: Size, count: int) -> list[Image.Image]:
    """The first `count` readable images of the source as `model` sees them at `size`, in their own colours again."""
    from PIL import Image

    way = preparation_for(model, source)
    for views, _, _ in _open_loader(model, source, size, count, workers=0, rank=0, world=1):
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (way.mean, way.std))
        pixels = ((views * std + mean) * 255).round().clamp(0, 255).byte().expand(-1, 3, -1, -1)
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    return []


def _open_loader(
    model: nn.Module, source: Source, size: Size, batch_size: int, workers: int, rank: int, world: int
) -> EvalLoader:
    way = preparation_for(model, source)
    test = ImageTest(source, size, way.mean, way.std, way.crop_pct, way.interpolation, way.in_chans)
    return EvalLoader(source, test, batch_size, workers, rank=rank, world=world)
