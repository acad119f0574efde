"""The interface of a task: everything that is specific to classification, segmentation, detection or video.

How data are opened, the network, the loss, the scores, how results are drawn, and the options and commands are all
attributes or methods of a `Task`. Training, evaluation, inference and the command line use this interface and never
check which task it is, so a new task is simply a new package in `anyres.tasks`.

The methods import what they need (torch, heads, scores) when they are called, because `anyres --help` lists the options
of all tasks and must not wait for torch.
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
    from anyres.data.fitting import OwnSize
    from anyres.data.loading import Views
    from anyres.data.samples import EvalBatch, EvalTransform
    from anyres.models._checkpoints import LoadReport
    from anyres.tasks.objective import Objective
    from anyres.tasks.results import Result
    from anyres.tasks.scores import Metric


@dataclass(frozen=True)
class Demo:
    """The models that a task's demo compares on built-in data, and at which sizes."""

    about: str
    runs: dict[str, str]
    """Name in the plots → recipe; the first is the multi-resolution one."""
    sizes: tuple[Size, ...]
    """Test sizes, from well below the smallest training size to well above the largest."""
    batch_size: int = 1
    """Items per batch in the comparison."""


class Task(ABC):
    """A task. There is one stateless instance of each, in `anyres.tasks.TASKS`."""

    name: ClassVar[str]
    group: ClassVar[str]
    """Word before its commands, as in `anyres segment train`; empty for none."""
    pipeline: ClassVar[str]
    """Name of the task on the Hugging Face Hub."""
    kind: ClassVar[Literal["image", "video"]] = "image"
    """Type of its inputs."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Optional packages that it needs, besides those for its data."""

    about_training: ClassVar[str]
    about_test: ClassVar[str]
    """First lines of the help of its `train` and `test` commands."""
    options: ClassVar[type[TaskOptions]]
    test_options: ClassVar[type[TestOptions]] = TestOptions
    test_size: ClassVar[int]
    """Default test size, as in published evaluations."""
    test_batch_size: ClassVar[int] = 1
    demo: ClassVar[Demo]

    score: ClassVar[str]
    """Column of metrics.csv that selects the best weights: the mean over the training sizes, in percent."""
    measure: ClassVar[str]
    """Name of that score in running text."""
    titles: ClassVar[dict[str, tuple[str, str]]]
    """Name of the main score → its long and short titles in plots."""
    second_titles: ClassVar[dict[str, str]] = {}
    """Titles of scores that tables show in brackets after the main one."""
    part_titles: ClassVar[dict[str, str]] = {}
    """Titles of scores of parts of the data, such as small objects, that reports show by size."""
    class_score: ClassVar[str] = ""
    """Name of the score of a single class, if there is one."""
    columns: ClassVar[dict[str, type]]
    """Columns of `Result.values` and `Result.rows`: title → type of the values, str, int or float."""
    draws: ClassVar[bool] = True
    """Whether the results are drawn."""
    keeps_ratio: ClassVar[bool] = False
    """Whether images keep their aspect ratio, so that a size is their short side rather than the size of a crop."""

    # Data ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def open_source(self, options: Any, split: str, like: Any = None) -> Any:
        """Open the "train" or "val" data of a training run.

        If `like`, an open source, is given, the classes are numbered and the channels are chosen like in that source.
        """

    @abstractmethod
    def open_test_source(self, data: str, split: str, models: Sequence[Any]) -> Any:
        """Open the data to evaluate the models on, including masks or keypoints if one of the models predicts them."""

    # Networks -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def build(self, options: Any, source: Any) -> Any:
        """Build the network to train, for the source's classes and channels."""

    @abstractmethod
    def from_config(self, config: dict[str, Any], state: dict[str, torch.Tensor], overrides: dict[str, Any]) -> Any:
        """Build a saved model from its config and weights. Raises UserError if the two do not fit."""

    @abstractmethod
    def load(self, model: Any, path: Path, ema: bool | None = None) -> LoadReport:
        """Load the weights of `init_from`. Weights that do not fit, or a head for other classes, are not loaded.

        `ema` chooses between averaged and raw weights, as in `load_checkpoint`.
        """

    # Training -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def views(self, options: Any, source: Any) -> Views:
        """Return the train transform, which turns an item of the source into views."""

    @abstractmethod
    def objective(self, options: Any, source: Any, accelerator: Any) -> Objective:
        """Return the training loss."""

    def set_training_mode(self, options: Any, model: nn.Module) -> None:
        """Put the model in training mode; called before every epoch."""
        model.train()

    def facts(self, options: Any, source: Any) -> dict[str, Any]:
        """Return what is needed to prepare data for the trained weights, for `pretrained_cfg`."""
        return {}

    def columns_of(self, scores: dict[str, float]) -> dict[str, float]:
        """Return the columns of metrics.csv for the scores of a validation, `score` first."""
        return scores

    # Evaluation and prediction ------------------------------------------------------------------------------------

    @abstractmethod
    def transform(self, config: DataConfig, size: Size | OwnSize, options: Any) -> EvalTransform:
        """Return the eval transform for a size, which may be the images' own."""

    @abstractmethod
    def forward(self, model: Any, batch: EvalBatch, device: torch.device, options: Any) -> Any:
        """Run the network on a batch and return its outputs on the device. Called in inference mode under autocast."""

    @abstractmethod
    def results(self, config: DataConfig, outputs: Any, batch: EvalBatch, options: Any) -> Sequence[Result]:
        """Convert the outputs of a batch to one result per item, at the size of the original.

        Raises UserError if the outputs are not finite.
        """

    @abstractmethod
    def metric(self, config: DataConfig, source: Any, options: Any) -> Metric:
        """Return a metric that accumulates the scores. Raises UserError if the classes do not fit the network's."""
