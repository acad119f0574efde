from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from anyres.errors import UserError
from anyres.evaluation.results import Row, area_over_log_size, areas, find, main_score, read_csv, write_csv
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


def test_finding_names_the_multi_resolution_model_when_it_is_better() -> None:
    rows = curve("multi", {32: 80.0, 64: 80.0}) + curve("single", {32: 20.0, 64: 82.0})
    finding = find(rows, MULTI)
    assert (
        finding.headline
        == "From 32 to 64 px, multi keeps 80.0 % on average; single, trained at one size, keeps 51.0 %."
    )
    assert "The gap is widest at 32 px: 80.0 % against 20.0 %." in finding.details
    assert "single is ahead at 64 px: 82.0 % against 80.0 %." in finding.details
    assert "At its training sizes (32, 64 px) multi reaches 80.0–80.0 %." in finding.details


def test_finding_says_so_when_it_is_worse() -> None:
    rows = curve("multi", {32: 50.0, 64: 50.0}) + curve("single", {32: 60.0, 64: 82.0})
    headline = find(rows, MULTI).headline
    assert (
        headline
        == "Multi-resolution training did not pay off here: from 32 to 64 px, single averages 71.0 %, multi 50.0 %."
    )


def test_finding_does_not_make_much_of_noise() -> None:
    rows = curve("multi", {32: 80.0, 64: 80.0}, count=360) + curve("single", {32: 78.0, 64: 78.0}, count=360)
    finding = find(rows, MULTI)
    assert finding.headline.startswith("No clear difference")
    # Two standard errors: 2·√(0.8·0.2/360) = 4.2 points.
    assert "With 360 images, a difference below about 4.2 points is within the noise." in finding.details


def test_finding_compares_with_the_best_of_the_other_kind() -> None:
    rows = (
        curve("multi", {32: 80.0, 64: 80.0})
        + curve("other", {32: 75.0, 64: 75.0})
        + curve("single", {32: 9.0, 64: 80.0})
    )
    finding = find(rows, MULTI)
    assert "single, trained at one size" in finding.headline
    assert "other averages 75.0 %." in finding.details


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
    assert "trained,ap,ap50,count" in (tmp_path / "sweep.csv").read_text()
    assert (rows[0].score, rows[1].score, main_score(rows)) == (None, 40.5, "ap")
