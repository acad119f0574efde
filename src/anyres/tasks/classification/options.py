"""Options of classification."""

from __future__ import annotations

from typing import Literal

from anyres.errors import UserError
from anyres.options import option
from anyres.tasks.options import LabelOptions, TestOptions


class TrainConfig(LabelOptions):
    """Options of a classifier's run; defaults are ResFormer's published ones where it has one."""

    crop_pct: float | None = option(
        None, "Validation: centre crop / resized short side; otherwise 0.875 (digits: 1).", gt=0, le=1
    )

    # Distillation from a teacher network
    teacher: str | None = option(None, "Teacher network: a timm name (regnety_160), or a run's weights folder.")
    teacher_weights: str | None = option(None, "Checkpoint of a timm teacher; otherwise timm's pretrained weights.")
    teacher_names: str | None = option(
        None, "File of the teacher's class names, one on a line, instead of those that it comes with."
    )
    teacher_kind: Literal["hard", "soft"] = option("hard", "Learn the teacher's arg-max label, or its probabilities.")
    teacher_alpha: float = option(0.5, "Weight of the teacher's term; the labels' has 1 minus this.", ge=0, le=1)
    teacher_tau: float = option(
        1.0, "Temperature of teacher_kind=soft (its term is divided by batch times classes).", gt=0
    )

    # Sparsification (DynamicViT)
    sparsify: float = option(
        0.0,
        "Weight of the keep-ratio loss; the unpruned model, from teacher_weights or init_from, teaches. 0: off.",
        ge=0,
    )

    @property
    def unused_parameters(self) -> bool:
        # Without a teacher a distilled model's second head gets no gradient.
        return self.teacher is None and "distilled" in self.model

    def check(self) -> None:
        super().check()
        if self.sparsify and self.teacher:
            raise UserError("sparsify has its own teacher, the unpruned model; leave teacher out")


class ClassificationTest(TestOptions):
    """Options of a classifier's evaluation."""

    of_results = ("topk",)

    topk: int = option(5, "Classes that a result names.", ge=1)
