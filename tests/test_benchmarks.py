"""The arithmetic of benchmarks/scaling.py and benchmarks/drawings.py: their figures stand in the documentation."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyres.training import load_config

ROOT = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scaling() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scaling.py"), run_name="scaling")


@pytest.fixture(scope="module")
def drawings() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "drawings.py"), run_name="drawings")


def test_every_method_is_a_valid_configuration(scaling: dict[str, Any]) -> None:
    for changes in scaling["METHODS"].values():
        load_config({**scaling["COMMON"], **changes, "epochs": 30})


@pytest.mark.parametrize("method", ["published", "sample", "any_size", "any_size, curriculum", "pair pape"])
def test_methods_have_the_arithmetic_of_the_single_size(scaling: dict[str, Any], method: str) -> None:
    images, views = 3200, 160_000

    def spent(method: str) -> tuple[int, float]:
        config = load_config({**scaling["COMMON"], **scaling["METHODS"][method]})
        return scaling["length"](config, images, views, "arithmetic")

    epochs, single = spent("single")
    assert epochs == views / images
    epochs, cost = spent(method)
    assert cost == pytest.approx(single, rel=0.5 / epochs + 0.02), "within half an epoch"
    assert epochs != views / images


def test_equal_epochs_are_equal(scaling: dict[str, Any]) -> None:
    config = load_config(scaling["COMMON"])
    assert scaling["length"](config, 3200, 160_000, "epochs")[0] == 50


def test_the_table_has_means_intervals_and_marks(scaling: dict[str, Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = [f"{side}x{side}" for side in scaling["SIDES"]] + ["48x85"]
    for method, share in (("single", 0.5), ("sample", 0.8), ("published", 0.5)):
        for seed in (0, 1, 2):
            right = {size: "".join(map(str, (rng.random(400) < share).astype(int))) for size in sizes}
            found: dict[str, Any] = {
                "data": "things",
                "method": method,
                "seed": seed,
                "views": 100.0,
                "equal": "arithmetic",
            }
            found |= {"action": "run", "options": {"lr": 0.01}, "epochs": 3, "teraflops": 1.0, "cpu_seconds": 60.0}
            (tmp_path / f"{method}{seed}.json").write_text(json.dumps(found | {"peak_gib": 0.5, "right": right}))
    lines = "\n".join(scaling["tables"](tmp_path, [])).splitlines()
    rows = {line.split("|")[1].strip(): line.split("|") for line in lines if line.startswith("| ")}
    assert all("+" in cell for cell in rows["sample"][7 : 7 + len(sizes)])
    assert not any("+" in cell or "−" in cell for cell in [*rows["single"][7:], *rows["published"][7:]])
    mean, _, interval = rows["sample"][-2].strip().partition(" ± ")
    assert abs(float(mean.strip("*")) - 80) < 3
    assert 0 < float(interval) < 5
    assert "400 validation images" in "\n".join(lines)


def test_the_documented_tables_are_those_of_the_recorded_runs(scaling: dict[str, Any]) -> None:
    text = (ROOT.parent / "docs" / "science.md").read_text()
    assert scaling["with_results"](text, "\n".join(scaling["tables"](ROOT / "results", []))) == text


def test_variants_of_an_icon_are_one_thing(drawings: dict[str, Any]) -> None:
    plain = drawings["VARIANT"].sub
    assert {plain("", name) for name in ("bell-outline", "bell-filled", "bell-24", "bell")} == {"bell"}
    assert plain("", "bell-off") == "bell-off"


def test_a_drawing_is_rendered_alike_each_time(drawings: dict[str, Any]) -> None:
    pytest.importorskip("resvg_py")
    icon = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><path fill="#000" d="M4 4h16v16H4z"/></svg>'
    one, other = (np.asarray(drawings["render"](icon, "square/one")) for _ in range(2))
    assert one.shape == (256, 256, 3)
    assert np.array_equal(one, other)
    assert not np.array_equal(one, np.asarray(drawings["render"](icon, "square/two"))), "another background"


@pytest.fixture(autouse=True)
def _scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
