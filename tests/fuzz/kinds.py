"""All kinds, and what their forked processes find imported."""

from __future__ import annotations

import importlib
import os

from tests.fuzz import checkpoints, images
from tests.fuzz.core import Kind

KINDS: dict[str, Kind] = {module.KIND.name: module.KIND for module in (images, checkpoints)}


def warm() -> None:
    """Import once what takes seconds. Nothing here may start a thread or look for a GPU: forks would not survive it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)
    for name in (
        "anyres.cli",
        "anyres.commands",
        "anyres.evaluation",
        "anyres.evaluation.plots",
        "anyres.evaluation.report",
        "anyres.overlay",
        "anyres.predict",
        "anyres.training.loop",
        *(f"anyres.training.{task}" for task in ("classification", "segmentation", "detection", "video")),
        "faster_coco_eval",
        "rich.table",
        "sklearn.datasets",
        "torch.utils.tensorboard",
    ):
        importlib.import_module(name)
