"""The demos: two networks side by side, a sweep, pictures. In miniature here, as a user runs them with `-m slow`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anyres.cli import demo
from anyres.data import composed, video_sources
from anyres.tasks import TASKS
from tests.typed import as_a

FLOORS = {
    "classification": ("top1", 97.0),
    "segmentation": ("miou", 85.0),
    "detection": ("ap50", 90.0),
    "video": ("top1", 90.0),
}
"""Score, and what the multi-resolution network reaches at its training sizes on average."""


class Inline:
    """A pool whose work is done at once, in this process, where the little data is."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, work: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
        return [work(*each) for each in zip(*arguments, strict=True)]


@pytest.mark.parametrize("task", FLOORS)
def test_a_demo_in_miniature(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed, "COUNTS", {"train": 24, "val": 3})
    monkeypatch.setattr(video_sources.MovingDigits, "counts", {"train": 48, "val": 6})
    monkeypatch.setattr(demo, "ProcessPoolExecutor", Inline)
    load = demo.load_config
    few = {"video": {}, "classification": {"epoch_size": 96}}.get(task, {"epoch_size": None})
    monkeypatch.setattr(demo, "load_config", lambda recipe, task, **options: load(recipe, task, **few, **options))
    kind = TASKS[task]
    monkeypatch.setattr(type(kind), "demo", replace(kind.demo, sizes=((64, 64), (80, 80))))
    result = demo.run_demo(kind, tmp_path, epochs=1)
    assert {row.model for row in result.rows} == set(kind.demo.runs)
    assert all(row.score is not None for row in result.rows)
    assert {"table", "picture", "report"} <= result.files.keys()
    if kind.draws:
        assert len(list(result.files["pictures"].glob("*.png"))) == (6 if task == "video" else 3)
    trained: list[Any] = []
    monkeypatch.setattr("anyres.training.loop.train_epoch", lambda run, _: trained.append(run))
    demo.run_demo(kind, tmp_path, epochs=1)
    assert not trained


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("task", FLOORS)
def test_a_demo_reaches_its_floor_and_holds_more_of_it_than_one_size(task: str, tmp_path: Path) -> None:
    result = demo.run_demo(TASKS[task], tmp_path)
    score, floor = FLOORS[task]
    several, single = TASKS[task].demo.runs
    reached = [row.scores[score] for row in result.rows if row.model == several and row.trained]
    assert sum(reached) / len(reached) >= floor
    assert result.areas[several] > result.areas[single]  # type: ignore[operator]
    at = {name: {row.size: row.score for row in result.rows if row.model == name} for name in (several, single)}
    # Below the training sizes the one-size network loses far more.
    smallest = min(at[single])
    if task == "classification":
        assert as_a(float, at[several][32, 32]) >= as_a(float, at[single][32, 32]) - 1
    assert as_a(float, at[several][smallest]) >= as_a(float, at[single][smallest]) + 10
