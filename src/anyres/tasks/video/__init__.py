"""Action recognition: clips at several sizes, mixup and label smoothing as in classification, top-1 accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyres.errors import UserError
from anyres.shapes import Size
from anyres.tasks.base import Demo, Task
from anyres.tasks.video.options import VideoConfig, VideoTest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from anyres.data import MapSource
    from anyres.data.config import DataConfig
    from anyres.data.fitting import OwnSize
    from anyres.data.samples import EvalBatch
    from anyres.data.video_views import ClipTest, ClipViews
    from anyres.models._checkpoints import LoadReport
    from anyres.tasks.accuracy import Accuracy
    from anyres.tasks.objective import Objective
    from anyres.tasks.results import Clip


class Video(Task):
    """Video classification with a video network, or an image model with temporal attention."""

    name = "video"
    group = "video"
    pipeline = "video-classification"
    kind = "video"
    about_training = "Train a video classifier at one or several resolutions, or continue a run."
    about_test = "Measure the accuracy of a video classifier over one or several views of each video."
    options = VideoConfig
    test_options = VideoTest
    test_size = 224
    test_batch_size = 8
    demo = Demo(
        "Train a multi-resolution ResFormer and an ordinary DeiT to recognise how digits move, and compare them at many"
        " sizes.",
        {"ResFormer": "digits", "DeiT": "digits_deit"},
        tuple((side, side) for side in (16, 24, 32, 40, 48, 56, 64, 80, 96, 128)),
        batch_size=24,
    )
    score = "top1"
    measure = "accuracy"
    titles = {"top1": ("Top-1 accuracy", "top-1")}  # noqa: RUF012  # typed in the base
    second_titles = {"top5": "top-5"}  # noqa: RUF012
    columns = {"class": str, "probability": float}  # noqa: RUF012

    def open_source(self, options: VideoConfig, split: str, like: MapSource | None = None) -> MapSource:
        from anyres.data.video_sources import open_video_source

        if like is None:
            return open_video_source(options.data, split)
        data, whole = options.validation_data
        return open_video_source(data, split, label_names=like.label_names, whole=whole)

    def open_test_source(self, data: str, split: str, models: Sequence[Any]) -> MapSource:
        from anyres.data.video_sources import open_video_source

        return open_video_source(data, split)

    def build(self, options: VideoConfig, source: MapSource) -> Any:
        from anyres.tasks.video.network import create_video_model

        arguments = {
            "in_chans": source.in_chans,
            "img_size": options.shapes[0],
            "drop_path_rate": options.drop_path,
            **options.model_args,
        }
        return create_video_model(options.model, len(source.label_names), options.frames, **arguments)

    def from_config(self, config: dict[str, Any], state: dict[str, Tensor], overrides: dict[str, Any]) -> Any:
        from anyres.tasks.video.network import SpaceTime

        if overrides:
            raise UserError(f"it is a model for {self.name}: load it without {', '.join(overrides)}.")
        return SpaceTime.from_config(config, state)

    def load(self, model: Any, path: Path, ema: bool | None = None) -> LoadReport:
        """Load the whole model from the weights of a video run, or the spatial part from those of an image model."""
        from anyres.tasks.video.network import SpaceTime
        from anyres.tasks.weights import holds_task, load_but_head

        if isinstance(model, SpaceTime) and not holds_task(path, self.name):
            return model.load_image_weights(path, ema)
        return load_but_head(model, path, model.head, ema)

    def views(self, options: VideoConfig, source: MapSource) -> ClipViews:
        from anyres.data.clips import Sampling
        from anyres.data.video_views import ClipViews
        from anyres.data.views import Augmentation

        return ClipViews(options.build(Augmentation), options.build(Sampling), source.mean, source.std)

    def objective(self, options: VideoConfig, source: MapSource, accelerator: Any) -> Objective:
        from anyres.tasks.labels import LabelObjective

        return LabelObjective(options, source)

    def facts(self, options: Any, source: MapSource) -> dict[str, Any]:
        return {
            "num_frames": options.frames,
            "frame_stride": options.stride,
            "crop_pct": options.crop_pct,
            "interpolation": options.interpolation,
        }

    def columns_of(self, scores: dict[str, float]) -> dict[str, float]:
        return {"top1": scores["top1"], "val_loss": scores["loss"]}

    def transform(self, config: DataConfig, size: Size | OwnSize, options: VideoTest) -> ClipTest:
        from anyres.data.clips import Sampling
        from anyres.data.video_views import ClipTest

        own = config.sampling
        return ClipTest(
            size,
            Sampling(options.frames or own.frames, options.stride or own.stride, options.segments),
            config.mean,
            config.std,
            options.clips,
            options.crops,
            options.crop_pct or (config.crop_pct if options.crops == 1 else 1.0),
            config.interpolation,
        )

    def forward(self, model: Any, batch: EvalBatch, device: torch.device, options: VideoTest) -> Tensor:
        from anyres.tasks.video.network import mean_over_views

        return mean_over_views([model(view.to(device)) for view in batch.inputs.views()])

    def results(self, config: DataConfig, outputs: Tensor, batch: EvalBatch, options: VideoTest) -> Sequence[Clip]:
        from anyres.tasks.results import Clip, likeliest

        best = likeliest(config, outputs, batch, options.topk)
        frames = batch.inputs.pixels[:, 0]
        frames = frames if frames.ndim == 5 else frames[..., None].expand(*frames.shape, 3)
        return [
            Clip(name, *found, pixels.numpy()) for name, found, pixels in zip(batch.names, best, frames, strict=True)
        ]

    def metric(self, config: DataConfig, source: Any, options: VideoTest) -> Accuracy:
        from anyres.tasks.video.score import ClipAccuracy

        return ClipAccuracy(config, source)


TASK = Video()
