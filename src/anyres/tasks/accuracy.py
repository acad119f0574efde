"""Accuracy of image and video classifiers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from anyres.data import EvalBatch, Source
from anyres.data.config import DataConfig
from anyres.errors import UserError
from anyres.tasks.evidence import Answers
from anyres.tasks.finite import check_outputs
from anyres.tasks.scores import Measured, Metric


class Accuracy(Metric):
    """Scores "top1", "top5" (with more than five classes) and "loss" (mean cross-entropy, nats) of logits (B, K)."""

    def __init__(self, config: DataConfig, source: Source) -> None:
        self.model, self.source = config.model, source.name
        self.places = config.places(source)
        self.classes = 0
        self.sums: list[Tensor] = []
        self.answers: list[tuple[list[int], Tensor, Tensor]] = []

    def update(self, outputs: Tensor, batch: EvalBatch) -> None:
        targets = self.places[batch.truth]
        self.classes = outputs.shape[-1]
        if int(targets.max()) >= self.classes:
            raise UserError(
                f"label {int(targets.max())} of {self.source} is beyond the model's {self.classes} classes: "
                "use the dataset that it was trained for"
            )
        # Summed at the end, so that there is no wait for the device here.
        self.sums.append(_score(outputs.float(), targets.to(outputs.device)))
        self.answers.append((batch.rows, targets, outputs.argmax(-1)))

    def share(self) -> Any:
        totals = torch.stack(self.sums).cpu().double().sum(0).tolist() if self.sums else [0.0] * 4
        return totals, self.classes, self._evidence()

    def _evidence(self) -> Answers:
        places = np.array([row for rows, _, _ in self.answers for row in rows], dtype=np.int32)
        columns = [truth for _, truth, _ in self.answers], [predicted for _, _, predicted in self.answers]
        truth, predicted = (
            torch.cat(column).cpu().numpy().astype(np.int32) if column else np.zeros(0, np.int32) for column in columns
        )
        return Answers(places, truth, predicted, np.full_like(places, self.classes))

    def compute(self, shares: list[Any], count: int) -> Measured:
        right1, right5, loss, lost = (sum(totals[column] for totals, *_ in shares) for column in range(4))
        check_outputs(self.model, not lost, f"{int(lost)} of the {count} items of {self.source}")
        top5 = {"top5": 100 * right5 / count} if max(classes for _, classes, _ in shares) > 5 else {}
        scores = {"top1": 100 * right1 / count, **top5, "loss": loss / count}
        return Measured(scores, count, evidence=Answers.join([evidence for *_, evidence in shares]))


def _score(logits: Tensor, targets: Tensor) -> Tensor:
    """Return (top-1 hits, top-5 hits, sum of the cross-entropy, number of non-finite rows) of a batch."""
    hits = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == targets[:, None]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    lost = logits.isfinite().all(-1).logical_not().sum()
    return torch.stack([hits[:, 0].sum(), hits.any(-1).sum(), loss, lost])
