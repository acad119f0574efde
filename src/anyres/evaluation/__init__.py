"""Accuracy and cost at any input size, and the report that shows both."""

from anyres.evaluation.aspects import parse_aspects, sizes_at_aspects
from anyres.evaluation.cost import Cost, measure_cost
from anyres.evaluation.evaluate import evaluate
from anyres.evaluation.results import Row, area_over_log_size, read_csv
from anyres.evaluation.sweep import SweepResult, sweep
from anyres.tasks.scores import Measured

__all__ = [
    "Cost",
    "Measured",
    "Row",
    "SweepResult",
    "area_over_log_size",
    "evaluate",
    "measure_cost",
    "parse_aspects",
    "read_csv",
    "sizes_at_aspects",
    "sweep",
]
