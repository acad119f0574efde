"""`anyres test`, and the test of every task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from anyres.cli.commands.values import present_device
from anyres.cli.paths import check_data, check_models
from anyres.cli.terminal import print_scores, print_table
from anyres.errors import UserError
from anyres.options import without
from anyres.tasks.base import Task

_TEST = """

    Args:
        model: a run, a saved model, a published weights file, a model name, or timm:NAME
        data: digits, or data of the task as in training
        split: split of the data
        names: file with the model's class names, one per line, to use instead of its own
        bit_depth: bits per channel of images with more than 8 bits, if the files do not say: 12, or 16 for dark images
        size: {size} (default {default})
        batch_size: items per batch (default {batch_size})
        device: auto, cpu, cuda, …
        precision: precision of autocast
        workers: number of processes that decode the data
        classes: also print the score of every class, if there is one
"""
_CROP = "side of the model's (square) input"
_SHORT = "short side of the images, which keep their aspect ratio"


def test_command(task: Task) -> Callable[..., None]:
    """Return the `test` command of a task, which measures its scores."""

    def test(
        model: str,
        *,
        data: str = "digits",
        split: Literal["val", "train"] = "val",
        names: str | None = None,
        bit_depth: int | None = None,
        size: Annotated[int | None, Field(ge=1)] = None,
        batch_size: Annotated[int | None, Field(ge=1)] = None,
        device: str = "auto",
        precision: Literal["float32", "bfloat16", "float16"] = "float32",
        workers: int = 0,
        classes: bool = True,
        **options: Any,
    ) -> None:
        check_models([model])
        check_data(data)
        from anyres.evaluation import evaluate
        from anyres.evaluation.evaluate import open_test_source
        from anyres.inference.modelspec import open_model
        from anyres.tasks import task_of

        device = present_device(device)
        task.test_options(**options).check_outputs()  # report a mistake before the model is loaded
        network: Any = open_model(model, names)[1]
        if task_of(network) is not task:
            raise UserError(
                f"{model} is a model for {task_of(network).name}, not for {task.name}; use the command for its task."
            )
        source = open_test_source(network, data, split, bit_depth=bit_depth)
        side = size or task.test_size
        measured = evaluate(network, source, (side, side), batch_size, device, precision, workers=workers, **options)
        if classes and measured.by_class:
            rows = [[name, "–" if value is None else f"{value:.1f}"] for name, value in measured.by_class.items()]
            print_table(["class", f"{task.class_score} (%)"], rows)
        print_scores(measured)

    what = _SHORT if task.keeps_ratio else _CROP
    test.__doc__ = task.about_test + _TEST.format(size=what, default=task.test_size, batch_size=task.test_batch_size)
    test.more_options = lambda: without(task.test_options, task.test_options.of_results)  # type: ignore[attr-defined]
    return test
