from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from anyres.errors import UserError
from anyres.evaluation.comparisons import compare, merged
from anyres.evaluation.results import Comparison, Row, area_over_log_size, areas, find, main_score, read_csv, write_csv
from anyres.tasks.evidence import Answers, Evidence
from tests.evaluation.helpers import make_row


def test_area_by_hand() -> None:
    # One octave from 40 to 60 % (mean 50), two octaves from 60 to 80 % (mean 70): (50 + 2·70) / 3.
    assert area_over_log_size({64: 60.0, 32: 40.0, 256: 80.0}) == pytest.approx(190 / 3)


def test_area_does_not_depend_on_how_dense_the_sizes_are() -> None:
    assert area_over_log_size({32: 71.0, 48: 71.0, 224: 71.0}) == pytest.approx(71)
    line = {side: 10 * math.log2(side) for side in (32, 33, 34, 35, 36, 512)}
    assert area_over_log_size(line) == pytest.approx(area_over_log_size({32: 50.0, 512: 90.0}))
    with pytest.raises(ValueError, match="two sizes"):
        area_over_log_size({32: 1.0})


def test_areas_compare_models_over_the_same_squares() -> None:
    rows = [make_row("a", side, side, value) for side, value in ((16, 0.0), (32, 40.0), (64, 60.0))]
    rows += [make_row("b", 16, 16, None), make_row("b", 32, 32, 50.0), make_row("b", 64, 64, 50.0)]
    rows += [make_row("fixed", side, side, 99.0 if side == 64 else None) for side in (16, 32, 64)]
    rows += [make_row("a", 32, 64, 0.0)]
    means, sides = areas(rows)
    assert sides == [32, 64]
    assert means == {"a": pytest.approx(50), "b": pytest.approx(50), "fixed": None}


def test_csv_round_trip(tmp_path: Path) -> None:
    rows = [
        make_row('with, comma "and" quotes', 32, 32, 100 / 3, trained=True, top5=1e-17, bad=3),
        make_row("b", 24, 43, None, loss=None, gflops=None, params=None, images_per_second=None, latency_ms=None,
                 peak_memory_mb=None, note="two\nlines"),
        make_row("c", 1, 2, 0.1 + 0.2, loss=float("inf")),
    ]  # fmt: skip
    write_csv(rows, tmp_path / "sweep.csv")
    assert read_csv(tmp_path / "sweep.csv") == rows
    write_csv([make_row("a", 8, 8, 1.0, loss=float("nan"))], tmp_path / "sweep.csv")
    assert math.isnan(read_csv(tmp_path / "sweep.csv")[0].scores["loss"])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a sweep table"):
        read_csv(tmp_path / "other.csv")


def curve(model: str, values: dict[int, float], count: int = 50_000) -> list[Row]:
    return [make_row(model, side, side, value, count=count) for side, value in values.items()]


MULTI = {"multi": [(32, 32), (64, 64)], "single": [(64, 64)], "other": [(32, 32), (64, 64)]}


def compared(rows: list[Row], p: float | None) -> list[Comparison]:
    """The first model beside the others at every size, all with one p-value."""
    first = rows[0].model
    scores = {(row.model, row.size): row.score or 0.0 for row in rows}
    return [
        Comparison(first, row.model, row.size, scores[first, row.size] - (row.score or 0.0), p)
        for row in rows if row.model != first
    ]  # fmt: skip


def test_the_headline_counts_the_sizes_at_which_a_test_supports_a_difference() -> None:
    rows = curve("multi", {32: 80.0, 64: 80.0}) + curve("single", {32: 20.0, 64: 82.0})
    finding = find(rows, MULTI, compared(rows, 0.01), "a test")
    assert finding.headline == (
        "From 32 to 64 px: multi (80.0 %) is ahead of single (51.0 %) at 1 of 2 sizes and behind at 1."
    )
    assert (
        "multi is most ahead, by 60.0 points, at 32 px and most behind, by 2.0 points, at 64 px in comparison with"
        " single." in finding.details
    )
    assert "At its training sizes (32, 64 px) multi reaches 80.0–80.0 %." in finding.details
    assert "Differences count where a test supports them at 5 %, corrected for 2 comparisons (Holm)." in finding.details


def test_the_headline_says_so_when_the_first_model_is_worse() -> None:
    rows = curve("multi", {32: 50.0, 64: 50.0}) + curve("single", {32: 60.0, 64: 82.0})
    headline = find(rows, MULTI, compared(rows, 0.01)).headline
    assert headline == ("From 32 to 64 px: multi (50.0 %) is behind single (71.0 %) at 2 of 2 sizes and ahead at none.")


def test_a_difference_that_no_test_supports_is_none() -> None:
    rows = curve("multi", {32: 80.0, 64: 80.0}) + curve("single", {32: 70.0, 64: 70.0})
    assert "no clear difference between multi (80.0 %) and single (70.0 %) at any of 2 sizes" in (
        find(rows, MULTI, compared(rows, 0.06)).headline
    )
    untested = find(rows, MULTI, compared(rows, None))
    assert "were not tested for a difference" in untested.headline
    assert "No test of differences is available here." in untested.details


def test_the_headline_compares_the_first_model_with_every_other() -> None:
    rows = [
        row for name, score in (("a", 80.0), ("b", 70.0), ("c", 90.0)) for row in curve(name, {32: score, 64: score})
    ]
    headline = find(rows, {}, compared(rows, 0.01)).headline
    assert "ahead of b (70.0 %) at 2 of 2" in headline
    assert "behind c (90.0 %) at 2 of 2" in headline


def test_finding_for_one_model_and_for_none_that_runs() -> None:
    assert find(curve("multi", {32: 80.0, 64: 90.0}), MULTI).headline == "multi averages 85.0 % from 32 to 64 px."
    only = [make_row("fixed", 64, 64, 70.0), make_row("fixed", 32, 32, None, note="no")]
    assert "70.0 % at 64×64 px" in find(only, {}).headline
    assert "could not run at any of the sizes" in find([make_row("fixed", 64, 64, None)], {}).headline


def test_other_scores_have_columns_of_their_own(tmp_path: Path) -> None:
    rows = [make_row("a", 8, 8, None), make_row("b", 8, 8, None)]
    rows[1] = dataclasses.replace(rows[1], scores={"ap": 40.5, "ap50": 61.25})
    write_csv(rows, tmp_path / "sweep.csv")
    assert read_csv(tmp_path / "sweep.csv") == rows
    assert "trained,ap,ap50,low,high,runs,count" in (tmp_path / "sweep.csv").read_text()
    assert (rows[0].score, rows[1].score, main_score(rows)) == (None, 40.5, "ap")


def right(count: int) -> Answers:
    """Of 100 answers, the first so many are right."""
    places = np.arange(100, dtype=np.int32)
    return Answers(places, np.zeros_like(places), (places >= count).astype(np.int32), np.full_like(places, 2))


def test_every_size_and_model_is_tested_and_corrected_for() -> None:
    scores = {"a": {32: 90, 64: 90}, "b": {32: 50, 64: 88}, "c": {32: 80, 64: 90}}
    rows = [
        row for name, values in scores.items() for row in curve(name, {side: float(n) for side, n in values.items()})
    ]
    evidence: dict[tuple[str, tuple[int, int]], Evidence] = {
        (name, (side, side)): right(n) for name, values in scores.items() for side, n in values.items()
    }
    found = {(each.other, each.size[0]): each for each in compare(rows, evidence, {})}
    assert {place for place, each in found.items() if each.clear} == {("b", 32), ("c", 32)}
    assert found["c", 32].p == pytest.approx(3 * 2 / 2**10)  # the second smallest of four: three are left
    assert found["b", 64].gap == 2
    del evidence["b", (64, 64)]
    assert [each.p for each in compare(rows, evidence, {}) if each.other == "b"][1] is None


def test_several_runs_become_one_row_with_their_range() -> None:
    rows = curve("s0", {32: 50.0}) + curve("s1", {32: 56.0}) + curve("b", {32: 10.0})
    both, other = merged(rows, {"seeds": ["s0", "s1"]})
    assert (both.model, both.score, both.low, both.high, both.runs) == ("seeds", 53.0, 50.0, 56.0, 2)
    assert other == rows[2]
    evidence: dict[tuple[str, tuple[int, int]], Evidence] = {
        (name, (32, 32)): right(n) for name, n in (("s0", 50), ("s1", 56), ("b", 10))
    }
    (each,) = compare([both, other], evidence, {"seeds": ["s0", "s1"]})
    assert each.p == pytest.approx(0.0773, abs=1e-3)  # t = 43 / (3·√2 · √1.5) with one degree of freedom
