"""mIoU of a segmentation model on a source of masked images at one input size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from anyres.data import EvalLoader
from anyres.data.segmentation import IGNORED, SegmentationSource
from anyres.data.segmentation_views import SegmentationTest
from anyres.errors import UserError
from anyres.evaluation.accuracy import _gather, process
from anyres.evaluation.cost import precision_context
from anyres.evaluation.results import Measured, Size, covered
from anyres.inference.finite import check_outputs, check_weights
from anyres.inference.preparation import check_size, label_names, label_places, preparation_for
from anyres.tasks.segmentation import predict_probabilities


class ConfusionMatrix:
    """How often pixels of each class were taken for each: one matrix over a whole set of images.

    `counts` (K, K) int64: rows are labels, columns predictions. Pixels whose label is `ignore` are left out.
    """

    def __init__(self, num_classes: int, ignore: int = IGNORED) -> None:
        self.num_classes, self.ignore = num_classes, ignore
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add(self, prediction: Tensor, label: Tensor) -> None:
        """Count the pixels of two maps of one shape; predictions are below `num_classes`. Raises UserError for a label
        that is not."""
        seen = label != self.ignore
        rows, columns = label[seen].long(), prediction[seen].long()
        counts = torch.bincount(rows * self.num_classes + columns, minlength=self.counts.numel()).cpu()
        if counts.numel() > self.counts.numel():
            raise UserError(f"a label is beyond the {self.num_classes} classes: number them from 0, or ignore it")
        self.counts += counts.view_as(self.counts)

    @property
    def iou(self) -> Tensor:
        """(K,) float64: pixels rightly taken for a class over those that are or were taken for it; NaN where there are
        none of either."""
        right, labelled, predicted = self._shares()
        return right / (labelled + predicted - right)

    @property
    def miou(self) -> float:
        """Mean IoU of the classes that were labelled or predicted anywhere in the set."""
        return float(self.iou.nanmean())

    @property
    def mean_accuracy(self) -> float:
        """Mean over the labelled classes of the share of their pixels that was found."""
        right, labelled, _ = self._shares()
        return float((right / labelled).nanmean())

    @property
    def pixel_accuracy(self) -> float:
        """Share of all pixels whose class was found."""
        right, labelled, _ = self._shares()
        return float(right.sum() / labelled.sum())

    def _shares(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each class the pixels that are rightly found, labelled, and predicted."""
        counts = self.counts.double()
        return counts.diagonal(), counts.sum(1), counts.sum(0)


@dataclass(frozen=True)
class SegmentationMeasured(Measured):
    """What `evaluate_segmentation` measured; `iou` of each class in percent, None where it is neither in the labels nor
    predicted."""

    iou: dict[str, float | None] = field(default_factory=dict)


def evaluate_segmentation(
    model: nn.Module,
    source: SegmentationSource,
    size: Size,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    *,
    workers: int = 0,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: int | Sequence[int] | None = None,
    longest: float = 4.0,
    divisor: int = 1,
) -> SegmentationMeasured:
    """Segment every image of `source` at `size` in inference mode: scores "miou", "pixel_accuracy", "mean_accuracy".

    The image is resized to fit `size` (a square: its short side; see `data.fitting.fit`), each side rounded up to a
    multiple of `divisor`, normalised as the model's `pretrained_cfg` states, and seen at `scales`, mirrored too with
    `flip`, whole or through a sliding `window` (see `predict_probabilities`). Classes are ranked at the size of the
    original labels. Images of one size share a batch.

    `precision` "bfloat16" and "float16" run under autocast. Under torch.distributed every process takes its own
    share of the images and all return the same; each image counts once. The model is moved to `device` and put back
    into its mode afterwards. Raises UserError when no image is readable, fewer than two classes are labelled, the
    classes do not fit the model's, weights or outputs are not finite, or the size is below the model's minimum.
    """
    check_size(model, size)
    device = torch.device(device)
    rank, world = process()
    way = preparation_for(model, source)
    places = label_places(model, source)
    table = torch.arange(256, dtype=torch.uint8)
    table[: len(places)] = places.byte()
    test = SegmentationTest(size, way.mean, way.std, longest, divisor)
    loader = EvalLoader(source, test, batch_size, workers, rank=rank, world=world)
    check_weights(model)
    was_training = model.training
    model = model.to(device).eval()
    matrix: ConfusionMatrix | None = None
    count = 0
    try:
        for batches in loader:
            for images, labels, names in batches:
                with precision_context(precision, device):
                    probabilities = predict_probabilities(
                        model, images.to(device, non_blocking=True), labels.shape[-2:], scales, flip, window
                    )
                matrix = matrix or ConfusionMatrix(probabilities.shape[1])
                if len(source.label_names) > matrix.num_classes:
                    raise UserError(
                        f"{source.name} has {len(source.label_names)} classes, and the model {matrix.num_classes}: use"
                        " the data set it was trained for"
                    )
                # One logit that is not finite makes all of a pixel's probabilities NaN.
                check_outputs(model, not probabilities[:, 0].isnan().any(), ", ".join(names))
                matrix.add(probabilities.argmax(1), table[labels.long()].to(device))
                count += len(names)
    finally:
        model.train(was_training)
    shares = _gather((matrix, count, tuple(str(image) for image in loader.bad)))
    bad = tuple(name for share in shares for name in share[2])
    matrices = [share[0] for share in shares if share[0] is not None]
    if not matrices:
        raise UserError(f"{source.name} has no readable image ({len(bad)} skipped): check the files")
    total: ConfusionMatrix = matrices[0]
    total.counts = torch.stack([other.counts for other in matrices]).sum(0)
    if not total.counts.any():
        raise UserError(f"{source.name} has no labelled pixel: check the masks and reduce_zero_label")
    if (total.counts.sum(1) > 0).sum() < min(2, len(source.label_names)):
        raise UserError(
            f"only one class has labelled pixels in the {sum(share[1] for share in shares)} images of {source.name}, so"
            " no score would say anything: give images of two classes or more; if masks are black and white, 0 and 255,"
            " train with mask_values=0,255"
        )
    scores = {
        "miou": 100 * total.miou,
        "pixel_accuracy": 100 * total.pixel_accuracy,
        "mean_accuracy": 100 * total.mean_accuracy,
    }
    names = label_names(model)
    percent = (100 * total.iou).tolist()
    iou = {name: None if math.isnan(value) else value for name, value in zip(names, percent, strict=True)}
    there = sum(value is not None for value in iou.values())
    note = covered("mIoU", there, len(iou), "the others are neither labelled nor predicted")
    return SegmentationMeasured(scores, sum(share[1] for share in shares), bad, note, iou)
