"""Options of classification."""

from __future__ import annotations

from typing import Literal

from anyres.errors import UserError
from anyres.options import option
from anyres.tasks.options import LabelOptions, TestOptions


class TrainConfig(LabelOptions):
    """Options for training a classifier; the defaults are ResFormer's as far as they are published."""

    crop_pct: float | None = option(
        None, "Validation: centre crop / resized short side; by default 0.875 (digits: 1).", gt=0, le=1
    )

    # Distillation from a teacher network
    teacher: str | None = option(None, "Teacher network: a timm name (regnety_160), or a run's weights folder.")
    teacher_weights: str | None = option(None, "Checkpoint of a timm teacher; by default timm's pretrained weights.")
    teacher_names: str | None = option(
        None, "File with the teacher's class names, one per line, to use instead of its own."
    )
    teacher_kind: Literal["hard", "soft"] = option(
        "hard", "Distill the teacher's argmax label (hard) or its probabilities (soft)."
    )
    teacher_alpha: float = option(
        0.5, "Weight of the distillation loss; the loss of the labels has 1 minus this.", ge=0, le=1
    )
    teacher_tau: float = option(
        1.0, "Temperature of teacher_kind=soft (the loss is divided by batch size x classes).", gt=0
    )

    # Sparsification (DynamicViT)
    sparsify: float = option(
        0.0,
        "Weight of DynamicViT's keep-ratio loss; 0 turns sparsification off. The teacher is the unpruned model, from "
        "teacher_weights or init_from.",
        ge=0,
    )

    @property
    def unused_parameters(self) -> bool:
        # Without a teacher, the second head of a distilled model gets no gradient.
        return self.teacher is None and "distilled" in self.model

    def check(self) -> None:
        super().check()
        if self.sparsify and self.teacher:
            raise UserError("sparsify uses the unpruned model as its teacher; leave teacher out")


class ClassificationTest(TestOptions):
    """Options for evaluating a classifier."""

    of_results = ("topk",)

    topk: int = option(5, "Number of classes in a result.", ge=1)
