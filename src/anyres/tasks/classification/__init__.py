"""Image classification: mixup and label smoothing, optional distillation from a teacher, top-1 accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyres.shapes import Size
from anyres.tasks.base import Demo, Task
from anyres.tasks.classification.options import ClassificationTest, TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from anyres.data import Source
    from anyres.data.config import DataConfig
    from anyres.data.fitting import OwnSize
    from anyres.data.samples import EvalBatch
    from anyres.data.views import ImageTest, ImageViews
    from anyres.models._checkpoints import LoadReport
    from anyres.tasks.accuracy import Accuracy
    from anyres.tasks.objective import Objective
    from anyres.tasks.results import Classes


class Classification(Task):
    """Image classification."""

    name = "classification"
    group = ""
    pipeline = "image-classification"
    about_training = "Train an image classifier at several resolutions at once, or continue a run."
    about_test = "Measure the accuracy of an image classifier at one size."
    options = TrainConfig
    test_options = ClassificationTest
    test_size = 224
    test_batch_size = 64
    demo = Demo(
        "Train an any-size network and an ordinary DeiT on built-in digits at equal cost, and compare their accuracy.",
        {"any size": "digits_any_size", "DeiT": "digits_deit"},
        (*((side, side) for side in (10, 12, 15, 20, 24, 28, 32, 40, 48, 64, 96)), (24, 30), (40, 32)),
        batch_size=120,
    )
    score = "top1"
    measure = "accuracy"
    titles = {"top1": ("Top-1 accuracy", "top-1")}  # noqa: RUF012  # typed in the base
    second_titles = {"top5": "top-5"}  # noqa: RUF012
    columns = {"rank": int, "label": str, "probability": float}  # noqa: RUF012
    draws = False

    def open_source(self, options: TrainConfig, split: str, like: Source | None = None) -> Source:
        from anyres.data import open_source

        if like is None:
            return open_source(options.data, split)
        data, whole = options.validation_data
        return open_source(data, split, in_chans=like.in_chans, label_names=like.label_names, whole=whole)

    def open_test_source(self, data: str, split: str, models: Sequence[Any]) -> Source:
        from anyres.data import open_source

        return open_source(data, split)

    def build(self, options: TrainConfig, source: Source) -> Any:
        from anyres.tasks.classification.objective import build_classifier

        return build_classifier(options, source)

    def from_config(self, config: dict[str, Any], state: dict[str, Tensor], overrides: dict[str, Any]) -> Any:
        from anyres.models._folders import model_of_folder

        return model_of_folder(config, state, **overrides)

    def load(self, model: Any, path: Path, ema: bool | None = None) -> LoadReport:
        from anyres.tasks.weights import load_but_head

        return load_but_head(model, path, model.get_classifier(), ema)

    def views(self, options: TrainConfig, source: Source) -> ImageViews:
        from anyres.data import Augmentation, ImageViews

        return ImageViews(options.build(Augmentation), source.mean, source.std)

    def objective(self, options: TrainConfig, source: Source, accelerator: Any) -> Objective:
        from anyres.tasks.classification.objective import ClassificationObjective

        return ClassificationObjective(options, source, accelerator)

    def facts(self, options: Any, source: Source) -> dict[str, Any]:
        return {"crop_pct": options.crop_pct or source.crop_pct, "interpolation": options.interpolation}

    def columns_of(self, scores: dict[str, float]) -> dict[str, float]:
        return {"top1": scores["top1"], "val_loss": scores["loss"]}

    def transform(self, config: DataConfig, size: Size | OwnSize, options: ClassificationTest) -> ImageTest:
        from anyres.data import ImageTest

        return ImageTest(size, config.mean, config.std, config.crop_pct, config.interpolation)

    def forward(self, model: Any, batch: EvalBatch, device: torch.device, options: ClassificationTest) -> Tensor:
        logits: Tensor = model(batch.inputs.to(device, non_blocking=True))
        return logits

    def results(
        self, config: DataConfig, outputs: Tensor, batch: EvalBatch, options: ClassificationTest
    ) -> Sequence[Classes]:
        from anyres.tasks.results import Classes, likeliest

        best = likeliest(config, outputs, batch, options.topk)
        return [Classes(name, *found) for name, found in zip(batch.names, best, strict=True)]

    def metric(self, config: DataConfig, source: Any, options: ClassificationTest) -> Accuracy:
        from anyres.tasks.accuracy import Accuracy

        return Accuracy(config, source)


TASK = Classification()
