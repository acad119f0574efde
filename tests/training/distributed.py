"""Started by torchrun in test_processes.py: the small run under DDP, then sharded, then stopped and resumed; a step of
other tasks' networks under DDP and sharded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from anyres.data import composed, video_sources
from anyres.training import load_config, train
from tests.contract.small import small_args
from tests.training.helpers import SAME_EVERYWHERE, small_config
from tests.training.test_tasks import RUNS

TWO_PATHS = {"model": "dynamicvit_swin_tiny", "model_args": small_args("dynamicvit_swin_tiny")}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "segmenter": ("segmentation", {"head": "semantic_fpn", "distillation": "none", **TWO_PATHS}),
    "detector": ("detection", {"head": "cascade_mask_rcnn", "distillation": "none"}),
    "space_time": ("video", {}),
    "region_time": ("video", {"model": "regionvit_tiny", "model_args": small_args("regionvit_tiny")}),
}
"""Task and options by name: what enters modules by other doors than `forward`."""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    train(small_config(folder / "ddp", **SAME_EVERYWHERE, ema_decay=0.5))
    train(small_config(folder / "fsdp", **SAME_EVERYWHERE, fsdp=True))
    stopped = small_config(folder / "resumed", **SAME_EVERYWHERE, fsdp=True, time_limit=1e-9)
    assert train(stopped).status == "time limit"
    train(small_config(folder / "resumed", **SAME_EVERYWHERE, fsdp=True))
    composed.COUNTS = video_sources.MovingDigits.counts = {"train": 4, "val": 2}
    for name, (task, changes) in OTHERS.items():
        for fsdp in (False, True):
            output = str(folder / name / ("fsdp" if fsdp else "ddp"))
            changes |= {"fsdp": fsdp, "output": output, "ema_decay": 0.0, "optimizer": "sgd", "lr": 0.1}
            once = {"epochs": 1, "epoch_size": 4, "sizes": [64], "warmup_epochs": 0}
            assert train(load_config(RUNS[task], task, **changes, **once)).status == "finished"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
