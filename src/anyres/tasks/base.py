"""A task is one object: everything that is particular to classification, segmentation, detection or video.

How data are opened, what is built, what training minimises, what is scored, how a result is drawn, which options and
commands there are: all of it is an attribute or a method of a `Task`. Training, evaluation, inference and the command
line ask the task and never which one it is, so that a new task is a new module in `anyres.tasks`.

What the methods need (torch, heads, scores) is imported where they run: the options of all tasks are listed by
`anyres --help`, which must not wait for torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from anyres.shapes import Size
from anyres.tasks.options import TaskOptions, TestOptions

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from anyres.data.config import DataConfig
    from anyres.data.loading import Views
    from anyres.data.samples import EvalBatch, EvalTransform
    from anyres.models._checkpoints import LoadReport
    from anyres.tasks.objective import Objective
    from anyres.tasks.results import Result
    from anyres.tasks.scores import Metric


@dataclass(frozen=True)
class Demo:
    """What a task's demo compares on built-in data, and where."""

    about: str
    runs: dict[str, str]
    """Name in the pictures → recipe; the first is the multi-resolution one."""
    sizes: tuple[Size, ...]
    """From well below the smallest training size to well above the largest."""
    batch_size: int = 1
    """Items per pass of the comparison."""


class Task(ABC):
    """A task. There is one object of each, in `anyres.tasks.TASKS`; it has no state."""

    name: ClassVar[str]
    group: ClassVar[str]
    """Word before the names of its commands, as in `anyres segment train`; empty for none."""
    pipeline: ClassVar[str]
    """The Hub's name of the task."""
    kind: ClassVar[Literal["image", "video"]] = "image"
    """What its inputs are."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Extras that it needs, besides those for its data."""

    about_training: ClassVar[str]
    about_test: ClassVar[str]
    """First lines of the help of its commands."""
    options: ClassVar[type[TaskOptions]]
    test_options: ClassVar[type[TestOptions]] = TestOptions
    test_size: ClassVar[int]
    """Size of its published tests."""
    test_batch_size: ClassVar[int] = 1
    demo: ClassVar[Demo]

    score: ClassVar[str]
    """Column of metrics.csv by which the best weights are chosen, in percent: the mean over the training sizes."""
    measure: ClassVar[str]
    """What that score is called in a sentence."""
    titles: ClassVar[dict[str, tuple[str, str]]]
    """Name of a main score → what it is called in pictures, long and short."""
    second_titles: ClassVar[dict[str, str]] = {}
    """Scores that tables put in brackets behind the main one."""
    class_score: ClassVar[str] = ""
    """What the score of a class is called, if there is one."""
    columns: ClassVar[tuple[str, ...]]
    """What `Result.rows` hold."""
    draws: ClassVar[bool] = True
    """Whether its results are drawn."""
    keeps_ratio: ClassVar[bool] = False
    """Whether a size is the short side of an image whose ratio is kept, rather than the size of a crop."""

    # Data ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def open_source(self, options: Any, split: str, like: Any = None) -> Any:
        """The data of "train" or "val" for training; with `like`, an open source, numbered and coloured as that
        one."""

    @abstractmethod
    def open_test_source(self, data: str, split: str, models: Sequence[Any]) -> Any:
        """The data that models are judged by, with the masks or keypoints that one of them gives."""

    # Networks -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def build(self, options: Any, source: Any) -> Any:
        """The network to train for the source's classes and channels."""

    @abstractmethod
    def from_config(self, config: dict[str, Any], state: dict[str, torch.Tensor], overrides: dict[str, Any]) -> Any:
        """The network of a saved model's folder. Raises UserError if the two do not fit."""

    @abstractmethod
    def load(self, model: Any, path: Path) -> LoadReport:
        """Take over the weights of `init_from`; what does not fit stays, and a head for other classes, too."""

    # Training -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def views(self, options: Any, source: Any) -> Views:
        """How the source's items become training views."""

    @abstractmethod
    def objective(self, options: Any, source: Any, accelerator: Any) -> Objective:
        """What training minimises."""

    def set_training_mode(self, options: Any, model: nn.Module) -> None:
        """Before every epoch."""
        model.train()

    def facts(self, options: Any, source: Any) -> dict[str, Any]:
        """What a user of the weights has to know about the data, for `pretrained_cfg`."""
        return {}

    def columns_of(self, scores: dict[str, float]) -> dict[str, float]:
        """What metrics.csv holds of a validation; `score` first."""
        return scores

    # Evaluation and prediction ------------------------------------------------------------------------------------

    @abstractmethod
    def transform(self, config: DataConfig, size: Size, options: Any) -> EvalTransform:
        """How items are prepared at a size."""

    @abstractmethod
    def forward(self, model: Any, batch: EvalBatch, device: torch.device, options: Any) -> Any:
        """What the network says about a batch, on the device; called in inference mode under autocast."""

    @abstractmethod
    def results(self, config: DataConfig, outputs: Any, batch: EvalBatch, options: Any) -> Sequence[Result]:
        """The outputs of a batch as results, one for each item, at the size of the original. Raises UserError if they
        are not finite."""

    @abstractmethod
    def metric(self, config: DataConfig, source: Any, options: Any) -> Metric:
        """What adds up the scores of a source. Raises UserError where its classes do not fit the network's."""
