"""All kinds, and what their forked processes find imported."""

from __future__ import annotations

import importlib
import os
import platform

from tests.fuzz import annotations as annotation_files
from tests.fuzz import checkpoints, folders, images, kills, options, recipes, run_states, saved_models
from tests.fuzz.core import Kind
from tests.fuzz.runs import little_data

_MODULES = (
    images,
    folders,
    checkpoints,
    saved_models,
    run_states,
    annotation_files,
    recipes,
    options,
    kills,
)
KINDS: dict[str, Kind] = {module.KIND.name: module.KIND for module in _MODULES}


def warm() -> None:
    """Import once what takes seconds. Nothing here may start a thread or look for a GPU: forks would not survive it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)
    for name in (
        "anyres.cli.main",
        "anyres.cli.commands",
        "anyres.evaluation.sweep",
        "anyres.evaluation.plots",
        "anyres.evaluation.report",
        "av",
        "anyres.inference.files",
        "anyres.training.loop",
        *(
            f"anyres.tasks.{task}.{part}"
            for task in ("segmentation", "detection", "video")
            for part in ("network", "score")
        ),
        "anyres.tasks.classification.objective",
        "anyres.tasks.drawing",
        "faster_coco_eval",
        "matplotlib.font_manager",
        "rich.table",
        "sklearn.datasets",
        "torch.utils.tensorboard",
    ):
        importlib.import_module(name)
    platform.processor()  # asks a program the first time
    little_data()
