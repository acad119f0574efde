"""`anyres train`, and the training of every task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anyres.cli.paths import check_data
from anyres.cli.terminal import number, say
from anyres.options import Options
from anyres.tasks.base import Task

_TRAIN = """

    Options on the command line override those of the recipe. Running the command again with the same output folder
    continues the run.

    Args:
        model: architecture, a name from `anyres models`
        recipe: name of a recipe that comes with anyres, or a YAML file such as RUN/config.yaml
"""


def train_command(task: Task) -> Callable[..., None]:
    """Return the `train` command of a task."""

    def train(model: str | None = None, *, recipe: str | None = None, **options: Any) -> None:
        check_data(options.get("data"), options.get("val_data"))
        from anyres.training import load_config
        from anyres.training import train as run

        if model is not None:
            options["model"] = model  # also `--model`, as in a recipe
        result = run(load_config(recipe, task.name, **options))
        if result.score is not None:
            found = f"best {task.measure} {number(result.score)} % over the training sizes; weights in"
            found = f"{found} {result.folder / 'best'}"
        elif result.rows:
            found = f"not validated; weights in {result.folder / 'last'}"
        else:
            found = "stopped before the end of the first epoch"
        stopped = result.status in ("signal", "time limit")
        say(f"{result.status}: {found}{'; the same command continues the run' * stopped}")
        if result.bad_images:
            say(f"{len(result.bad_images)} unreadable files were skipped; {result.folder / 'summary.json'} lists them.")

    train.__doc__ = task.about_training + _TRAIN
    train.more_options = lambda: _options(task)  # type: ignore[attr-defined]
    return train


def _options(task: Task) -> type[Options]:
    from anyres.training.config import config_of

    return config_of(task.name)
