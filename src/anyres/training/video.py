"""Action recognition: clips at several sizes, mixed and smoothed labels as in classification, top-1 of clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from anyres.data import MapSource
from anyres.data.clips import Sampling
from anyres.data.schedule import Size
from anyres.data.video_sources import open_video_source
from anyres.data.video_views import ClipViews
from anyres.evaluation.video import evaluate_video
from anyres.models._checkpoints import LoadReport
from anyres.tasks.video import SpaceTime, create_video_model
from anyres.training.classification import augmentation, mixing
from anyres.training.config import VideoConfig
from anyres.training.losses import BaseLoss, soft_cross_entropy
from anyres.training.task import Task, holds_task, load_but_head


class Video(Task):
    """A video network, or an image model with attention over time."""

    config: VideoConfig
    score = "acc1"

    def open_source(self, split: str, like: MapSource | None = None) -> MapSource:
        config = self.config
        if like is None:
            return open_video_source(config.data, split)
        data, whole = self.validation_data()
        return open_video_source(data, split, label_names=like.label_names, whole=whole)

    def build_model(self, source: MapSource) -> Any:
        config = self.config
        return create_video_model(
            config.model,
            len(source.label_names),
            config.frames,
            **{
                "in_chans": source.in_chans,
                "img_size": config.shapes[0],
                "drop_path_rate": config.drop_path,
                **config.model_args,
            },
        )

    def views(self, source: MapSource) -> ClipViews:
        return ClipViews(augmentation(self.config), self.sampling, source.mean, source.std)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.config.frames, self.config.stride)

    def build_loss(self, source: MapSource, accelerator: Accelerator) -> BaseLoss:
        self.mixing = mixing(self.config, source)
        return lambda outputs, target, view: soft_cross_entropy(outputs["logits"], target)

    def mix(
        self, views: list[Tensor], targets: list[Tensor], epoch: int, step: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        return self.mixing(views, targets[0], epoch, step)

    def evaluate(
        self, model: Any, source: MapSource, size: Size, device: torch.device, precision: str
    ) -> dict[str, float]:
        scores = evaluate_video(model, source, size, self.config.eval_batch_size, device, precision).scores
        return {"acc1": scores["top1"], "val_loss": scores["loss"]}

    def facts(self, source: MapSource) -> dict[str, Any]:
        config = self.config
        return {
            "num_frames": config.frames,
            "frame_stride": config.stride,
            "crop_pct": config.crop_pct,
            "interpolation": config.interpolation,
        }

    def load(self, model: Any, path: Path) -> LoadReport:
        """Weights of a video run fill the whole model; those of an image model the space part."""
        if isinstance(model, SpaceTime) and not holds_task(path, "video"):
            return model.load_image_weights(path)
        return load_but_head(model, path, model.head)
