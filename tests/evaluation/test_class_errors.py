from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anyres.evaluation import class_errors as module
from anyres.evaluation import sweep
from anyres.evaluation.class_errors import class_errors
from anyres.evaluation.report import Page, render
from anyres.tasks.evidence import Answers, Evidence, Regions
from tests.evaluation.helpers import GreySource, TableModel, make_row

SIZES = [(16, 16), (32, 32)]
Seen = dict[tuple[str, tuple[int, int]], Evidence]


def answers(truth: list[int], predicted: list[int], classes: int) -> Answers:
    places = np.arange(len(truth), dtype=np.int32)
    return Answers(places, np.array(truth), np.array(predicted), np.full(len(truth), classes))


def of(evidence: Seen, source: GreySource, runs: list[list[str]], **cfg: Any) -> dict[str, Any]:
    classes = len(source.label_names)
    models = {run: TableModel(torch.eye(classes), **cfg) for own in runs for run in own}
    found = class_errors(runs, models, evidence, SIZES, source, None)
    assert found is not None
    return found


def test_classes_are_those_of_the_data_whatever_the_order_of_the_outputs() -> None:
    source = GreySource([0, 0, 1], classes=2)
    model = {"label_names": ["class1", "class0"]}  # output 1 is class 0
    seen: Seen = {("m", (16, 16)): answers([1, 1, 0], [1, 0, 0], 2), ("m", (32, 32)): answers([1, 1, 0], [1, 1, 1], 2)}
    found = of(seen, source, [["m"]], **model)
    assert found["scores"] == [[[50.0, 100.0], [100.0, 0.0]]]
    assert sorted(map(tuple, found["confusions"][0][0])) == [(0, 0, 1), (0, 1, 1), (1, 1, 1)]
    assert [image["name"] for image in found["images"]] == ["grey/1", "grey/2"]
    assert found["images"][0]["answers"] == [["class1", "class0"]]
    json.dumps(found)


def test_of_many_classes_the_worst_are_shown(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "CLASSES", 2)
    source = GreySource([0, 1, 2, 3], classes=4)
    seen: Seen = {("m", (16, 16)): answers([0, 1, 2, 3], [0, 3, 2, 1], 4)}
    found = of(seen, source, [["m"]])
    assert (found["classes"], found["total"]) == (["class1", "class3"], 4)
    assert found["scores"] == [[[0.0, 0.0], None]]


def test_runs_are_averaged_and_pictures_bounded(monkeypatch: Any) -> None:
    source = GreySource([0, 1], classes=2)
    seen: Seen = {("a", (16, 16)): answers([0, 1], [0, 1], 2), ("b", (16, 16)): answers([0, 1], [1, 1], 2),
                  ("a", (32, 32)): answers([0, 1], [1, 0], 2)}  # fmt: skip
    found = of(seen, source, [["a", "b"]])
    assert found["scores"][0][0] == [50.0, 100.0]
    assert len(found["images"]) == 2
    monkeypatch.setattr(module, "THUMBNAIL_BYTES", len(found["images"][0]["picture"]) + 1)
    assert len(of(seen, source, [["a", "b"]])["images"]) == 1


def test_regions_have_classes_and_no_confusions() -> None:
    source = GreySource([0], classes=2)
    seen: Seen = {("m", (16, 16)): Regions(np.array([0]), np.array([[1, 0]]), np.array([[4, 0]]))}
    found = of(seen, source, [["m"]])
    assert found["scores"] == [[[25.0, None], None]]
    assert found["confusions"] == [[[], []]]
    assert found["images"] == []


def test_names_reach_the_page_as_data(tmp_path: Path) -> None:
    names = ["</script><script>alert(1)</script>", "b"]
    source = GreySource([0, 1], classes=2)
    source.label_names = names
    model = TableModel(torch.eye(2), label_names=names)
    page = sweep({"m": model}, source, SIZES, tmp_path, cost=False).files["report"].read_text()
    assert page.count("<script") == 2
    content = page.partition("id='errors-data'>")[2].partition("</script>")[0]
    assert json.loads(content)["classes"] == names


def test_scores_of_parts_are_shown_by_size() -> None:
    rows = [make_row("m", side, side, None, images_per_second=None) for side in (16, 32)]
    scores = ({"ap": 30.0, "ap_small": 11.5}, {"ap": 40.0, "ap_small": 12.5, "ap_large": 77.5})
    for row, values in zip(rows, scores, strict=True):
        row.scores.update(values)
    page = render(Page(rows, {}, "boxes"))
    assert "<th scope='row'>AP of small objects</th><td>11.5</td><td>12.5</td>" in page
    assert "<th scope='row'>AP of large objects</th><td>–</td><td>77.5</td>" in page
