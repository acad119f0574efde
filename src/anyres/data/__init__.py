"""Labelled images from folders, Hugging Face, shards and scikit-learn's digits, as multi-resolution batches."""

from anyres.data.base import Item, MapSource, Source, StreamSource
from anyres.data.config import DataConfig
from anyres.data.decode import BadImage, load_image
from anyres.data.eval_loader import EvalLoader
from anyres.data.listing import list_images
from anyres.data.mixing import Mixing, smooth_labels
from anyres.data.samples import EvalBatch
from anyres.data.schedule import SizeSchedule, parse_sizes
from anyres.data.sources import open_source
from anyres.data.train_loader import Batch, TrainLoader
from anyres.data.views import (
    Augmentation,
    ImageTest,
    ImageViews,
    evaluation_views,
    normalize,
    to_batch,
)

__all__ = [
    "Augmentation",
    "BadImage",
    "Batch",
    "DataConfig",
    "EvalBatch",
    "EvalLoader",
    "ImageTest",
    "ImageViews",
    "Item",
    "MapSource",
    "Mixing",
    "SizeSchedule",
    "Source",
    "StreamSource",
    "TrainLoader",
    "evaluation_views",
    "list_images",
    "load_image",
    "normalize",
    "open_source",
    "parse_sizes",
    "smooth_labels",
    "to_batch",
]
