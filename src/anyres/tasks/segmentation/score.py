"""mIoU of a segmentation network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyres.data.config import DataConfig
from anyres.data.samples import EvalBatch
from anyres.data.segmentation import IGNORED, SegmentationSource
from anyres.errors import UserError
from anyres.tasks.evidence import Regions
from anyres.tasks.finite import check_outputs
from anyres.tasks.scores import Measured, Metric, covered


class ConfusionMatrix:
    """Confusion matrix of pixels over a whole set of images.

    `counts` (K, K) int64 has labels as rows and predictions as columns. Pixels whose label is `ignore` are left out.
    """

    def __init__(self, num_classes: int, ignore: int = IGNORED) -> None:
        self.num_classes, self.ignore = num_classes, ignore
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add(self, prediction: Tensor, label: Tensor) -> None:
        """Count the pixels of a prediction and a label map of the same shape.

        Predictions must be below `num_classes`. Raises UserError for a label that is not.
        """
        seen = label != self.ignore
        rows, columns = label[seen].long(), prediction[seen].long()
        counts = torch.bincount(rows * self.num_classes + columns, minlength=self.counts.numel()).cpu()
        if counts.numel() > self.counts.numel():
            raise UserError(f"a label is beyond the {self.num_classes} classes: number them from 0, or ignore it")
        self.counts += counts.view_as(self.counts)

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class, (K,) float64; NaN for classes neither labelled nor predicted."""
        right, labelled, predicted = self.shares()
        return right / (labelled + predicted - right)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that were labelled or predicted anywhere."""
        return float(self.iou.nanmean())

    @property
    def mean_accuracy(self) -> float:
        """Fraction of correctly classified pixels of each labelled class, averaged over these classes."""
        right, labelled, _ = self.shares()
        return float((right / labelled).nanmean())

    @property
    def pixel_accuracy(self) -> float:
        """Fraction of correctly classified pixels."""
        right, labelled, _ = self.shares()
        return float(right.sum() / labelled.sum())

    def shares(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the number of correct, labelled and predicted pixels of each class."""
        counts = self.counts.double()
        return counts.diagonal(), counts.sum(1), counts.sum(0)


def check_probabilities(model: str, probabilities: Tensor, names: Sequence[str]) -> None:
    """Raise UserError if the probabilities (B, K, H, W) are not finite."""
    # A single non-finite logit makes all probabilities of a pixel NaN, so checking one class is enough.
    check_outputs(model, not probabilities[:, 0].isnan().any(), ", ".join(names))


class MeanIoU(Metric):
    """Scores "miou", "pixel_accuracy" and "mean_accuracy" of probabilities (B, K, H, W); `by_class` is the IoU."""

    def __init__(self, config: DataConfig, source: SegmentationSource) -> None:
        self.config, self.source = config, source
        places = config.places(source)
        self.table = torch.arange(256, dtype=torch.uint8)
        self.table[: len(places)] = places.byte()
        self.matrix: ConfusionMatrix | None = None
        self.rows: list[int] = []
        self.pixels: list[np.ndarray] = []  # (2, K) of each image: found, union

    def update(self, outputs: Tensor, batch: EvalBatch) -> None:
        check_probabilities(self.config.model, outputs, batch.names)
        self.matrix = self.matrix or ConfusionMatrix(outputs.shape[1])
        if len(self.source.label_names) > self.matrix.num_classes:
            raise UserError(
                f"{self.source.name} has {len(self.source.label_names)} classes, but the model has"
                f" {self.matrix.num_classes}: use the dataset that it was trained for"
            )
        labels = self.table[batch.truth.long()].to(outputs.device)
        for row, prediction, label in zip(batch.rows, outputs.argmax(1), labels, strict=True):
            single = ConfusionMatrix(self.matrix.num_classes)
            single.add(prediction, label)
            self.matrix.counts += single.counts
            found, labelled, predicted = single.shares()
            self.rows.append(row)
            self.pixels.append(torch.stack([found, labelled + predicted - found]).numpy().astype(np.int32))

    def share(self) -> Any:
        if self.matrix is None:
            return None
        pixels = np.stack(self.pixels)
        return self.matrix, Regions(np.array(self.rows, dtype=np.int32), pixels[:, 0], pixels[:, 1])

    def compute(self, shares: list[Any], count: int) -> Measured:
        matrices = [share[0] for share in shares if share is not None]
        total = ConfusionMatrix(matrices[0].num_classes)
        total.counts = torch.stack([matrix.counts for matrix in matrices]).sum(0)
        if not total.counts.any():
            raise UserError(f"{self.source.name} has no labelled pixel: check the masks and reduce_zero_label")
        if (total.counts.sum(1) > 0).sum() < min(2, len(self.source.label_names)):
            raise UserError(
                f"only one class has labelled pixels in the {count} images of {self.source.name}, so a score would be"
                " meaningless: give images of two classes or more; if the masks are black and white, 0 and 255, train"
                " with mask_values=0,255"
            )
        scores = {
            "miou": 100 * total.miou,
            "pixel_accuracy": 100 * total.pixel_accuracy,
            "mean_accuracy": 100 * total.mean_accuracy,
        }
        percent = (100 * total.iou).tolist()
        pairs = zip(self.config.label_names, percent, strict=True)
        by_class = {name: None if math.isnan(value) else value for name, value in pairs}
        there = sum(value is not None for value in by_class.values())
        note = covered("mIoU", there, len(by_class), "the others are neither labelled nor predicted")
        evidence = Regions.join([share[1] for share in shares if share is not None])
        return Measured(scores, count, note=note, by_class=by_class, evidence=evidence)
