"""`anyres train`, and the training of every task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anyres.cli.commands.values import read_mapping
from anyres.cli.terminal import (
    number,
    say,
)

_TRAIN = """

    Options come from the recipe, then from the command line. A second start with the same output folder continues the
    run.

    Args:
        model: architecture, a name from `anyres models`
        recipe: name of a recipe that comes with anyres, or a YAML file (such as RUN/config.yaml)
"""


def _training_command(task: str, about: str, measure: str) -> Callable[..., None]:
    """The command that trains for a task; `measure` is what its score is called."""

    def train(model: str | None = None, *, recipe: str | None = None, **options: Any) -> None:
        from anyres.training import load_config
        from anyres.training import train as run

        if model is not None:
            options["model"] = model  # also `--model`, as in a recipe
        for name in ("model_args", "head_args"):
            if name in options:
                options[name] = read_mapping(name, options[name])
        result = run(load_config(recipe, task, **options))
        best = f"best {measure} {number(result.score)} % over the training sizes; weights in {result.folder / 'best'}"
        stopped = result.status in ("signal", "time limit")
        say(
            f"{result.status}: {'stopped before the first validation' if result.score is None else best}"
            + "; the same command continues the run" * stopped
        )
        if result.bad_images:
            say(f"{len(result.bad_images)} unreadable files were skipped; {result.folder / 'summary.json'} names them.")

    train.__doc__ = about + _TRAIN
    train.more_options = lambda: _train_options(task)  # type: ignore[attr-defined]
    return train


def _train_options(task: str) -> dict[str, tuple[Any, Any, str]]:
    """The options of a recipe, as (type, default, help) by name."""
    from anyres.training.config import CONFIGS

    found = {}
    for name, field in CONFIGS[task].model_fields.items():
        default = field.default
        shown = ",".join(map(str, default)) if isinstance(default, list) else str(default)
        note = "" if default in (None, {}, "") or isinstance(default, bool) or not shown else f" (default {shown})"
        found[name] = (field.annotation, default, f"{field.description}{note}")
    return found


train = _training_command(
    "classification", "Train a classifier at several resolutions at once, or continue a run.", "accuracy"
)


segment_train = _training_command(
    "segmentation", "Train a segmentation network on any backbone, at one or several resolutions, or continue.", "mIoU"
)


detect_train = _training_command(
    "detection", "Train a detector on any backbone, at one or several resolutions, or continue.", "box AP"
)


video_train = _training_command(
    "video", "Train a network on clips, at one or several resolutions, or continue.", "accuracy"
)
