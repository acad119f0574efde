"""Tiny runs of every task on built-in data, and what they leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.fuzz.core import Failure, Ran, command, in_child
from tests.training.helpers import metrics, weights

_COMMON: dict[str, Any] = {
    "precision": "float32",
    "device": "cpu",
    "progress": False,
    "workers": 0,
    "epochs": 2,
    "warmup_epochs": 0,
    "eval_every": 2,
    "batch_size": 4,
    "epoch_size": 12,
    "keep": 2,
    "save_every_steps": 2,
    "ema_decay": 0.9,
    "decay": "cosine",
    "drops": [],
}
_PYRAMID = {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "mlp_ratios": [2, 2, 2, 2]}
_PLAIN = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "classification": {
        **_COMMON,
        "model": "resformer_tiny",
        "model_args": _PLAIN,
        "sizes": [16, 12],
        "fraction": 1.0,
        "auto_augment": None,
    },
    "segmentation": {
        **_COMMON,
        "model": "pvt_v2_b0",
        "model_args": _PYRAMID,
        "sizes": [48, 32],
        "head": "upernet",
        "head_args": {"channels": 8},
    },
    "detection": {
        **_COMMON,
        "model": "pvt_v2_b0",
        "model_args": _PYRAMID,
        "sizes": [48],
        "head": "mask_rcnn",
        "head_args": {"channels": 8, "hidden": 16, "rpn_pre_nms": [50, 20], "rpn_post_nms": 10, "box_batch": 8},
    },
    "video": {
        **_COMMON,
        "model": "resformer_tiny",
        "model_args": {**_PLAIN, "patch_size": 8},
        "sizes": [24, 16],
        "frames": 2,
        "stride": 4,
    },
}
"""By task."""
PREFIX = {"classification": [], "segmentation": ["segment"], "detection": ["detect"], "video": ["video"]}
"""The first word of a task's commands."""


def little_data() -> None:
    """A dozen scenes, clips and digits instead of hundreds, in this process and its children."""
    from anyres.data import composed, sources, video_sources

    composed.COUNTS = {"train": 12, "val": 3}
    video_sources.MovingDigits.counts = {"train": 12, "val": 6}
    table = sources._digits_table()
    sources._digits_table = lambda: table[:200]


def train_words(task: str, **options: Any) -> list[str]:
    """The command line of a tiny run, with changed options."""
    values = {**OPTIONS[task], **options}
    return [*PREFIX[task], "train", *(f"{name}={_text(value)}" for name, value in values.items())]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def finished(folder: Path, task: str) -> Path:
    """A finished run, made at the first call and shared by all kinds."""
    run = folder.parent / "runs" / task
    if not run.exists():
        assert in_child(lambda: _train(task, run)) == 0, f"the {task} run failed"
    return run


def _train(task: str, folder: Path) -> None:
    ran = command(*train_words(task, output=folder))
    assert ran.code == 0, ran.err


class Began(BaseException):
    """A network ran: the command is past everything that could be wrong with its options and files."""


def until_work(start: Callable[[], Ran], seconds: float = 0) -> tuple[Ran | None, str]:
    """What a command leaves, and the verdict; none and "began" if it is left when a network runs for the first time,
    or `seconds` after that.

    What a person asked for may take more memory than this process may have: that is no mistake either.
    """

    def before_forward(*_: Any) -> None:
        hook.remove()
        if not seconds:
            raise Began
        signal.signal(signal.SIGALRM, time_is_over)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def time_is_over(*_: Any) -> None:
        raise Began

    hook = torch.nn.modules.module.register_module_forward_pre_hook(before_forward)
    try:
        ran = start()
        return ran, ran.verdict()
    except Began:
        return None, "began"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return None, "began"
        raise
    finally:
        hook.remove()


def interrupted(task: str, folder: Path, after: int) -> None:
    """Leave a run in this process by a signal in its step `after`."""
    from anyres.training import loop

    original = loop.step

    def step(run: Any, batches: Any) -> Any:
        if run.position.updates + 1 == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, batches)

    loop.step = step
    _train(task, folder)


@dataclass(frozen=True)
class Outcome:
    """What a finished run must have, whatever happened to it: its weights to the bit, and the rows of metrics.csv."""

    weights: dict[str, bytes]
    rows: list[dict[str, str]]

    @classmethod
    def of(cls, run: Path) -> Outcome:
        folders = ("last", "last_ema", "best", "best_ema")
        return cls({name: weights(run / name) for name in folders if (run / name).is_dir()}, metrics(run))

    def check(self, run: Path) -> None:
        """Raises Failure."""
        found = Outcome.of(run)
        wrong = [name for name, content in self.weights.items() if found.weights.get(name) != content]
        if wrong:
            raise Failure(f"{', '.join(wrong)} differ from those of a run that nothing disturbed")
        if found.rows != self.rows:
            raise Failure("metrics.csv differs from that of a run that nothing disturbed")
        left = [path.name for path in run.rglob("*") if ".tmp" in path.name or path.name.endswith(".old")]
        if left:
            raise Failure(f"left behind: {left}")


def write_video(path: Path, frames: int = 8) -> None:
    """A clip of 48 x 32 pixels."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(frames):
            pixels = np.full((32, 48, 3), 20 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
