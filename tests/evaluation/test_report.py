from __future__ import annotations

import base64
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_rgba
from PIL import Image

from anyres.evaluation import plots
from anyres.evaluation.plot_style import COLOURS, drawn_name
from anyres.evaluation.report import Page, Samples, render
from anyres.evaluation.results import Row
from anyres.io.text import printable, shorten
from tests.evaluation.helpers import make_row
from tests.io.test_text import NASTY

SIDES = (16, 24, 32, 64)
NAMES = ("resformer_mr", "deit <b>&'\"")


def rows() -> list[Row]:
    made = []
    for number, name in enumerate(NAMES):
        for side in SIDES:
            refused = number == 1 and side == 16
            made.append(
                make_row(name, side, side, None if refused else 50.0 + side / 2 - 3 * number, trained=side == 32, bad=2,
                         note="Input height (16) doesn't match" if refused else "", images_per_second=6400 / side)
            )  # fmt: skip
        made.append(make_row(name, 24, 43, 61.25 - number))
    return made


@pytest.fixture(scope="module")
def page() -> str:
    return render(
        Page(
            rows(),
            {NAMES[0]: [(24, 24), (32, 32)], NAMES[1]: [(32, 32)]},
            "digits/val",
            facts={"Command": "anyres sweep <x>", "Hardware": "some processor"},
            preparation=dict.fromkeys(NAMES, "bicubic resize"),
            samples=[Samples((24, 43), [Image.new("RGB", (43, 24), "red")])],
            bad=["broken.jpg: truncated"],
        )
    )


def test_every_model_and_size_is_there(page: str) -> None:
    text = page.replace("\u2011", "-")
    assert "resformer_mr" in text
    assert "deit &lt;b&gt;&amp;" in text
    assert "<b>&'" not in text
    for side in SIDES:
        assert f"<th scope='row'>{side}</th>" in text
    assert "24×43 <small>16:9</small>" in text
    for row in rows():
        if row.score is not None:
            assert f"{row.score:.1f}" in text
    assert "Input height (16)" in text
    assert "could not run at 1 of 5 sizes" in text
    assert "2 unreadable images" in text
    assert "broken.jpg: truncated" in text
    assert "anyres sweep &lt;x&gt;" in text
    assert "some processor" in text


def test_nothing_is_loaded_from_outside(page: str) -> None:
    assert "http" not in page
    assert "<script" not in page  # without errors by size
    assert "<link" not in page
    sources = re.findall(r"(?:src|srcset|href)\s*=\s*['\"]([^'\"]*)", page)
    assert len(sources) >= 7
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"url\(|@import", page)
    for source in sources:
        kind, _, content = source.partition(";base64,")
        if kind == "data:image/svg+xml":
            picture = base64.b64decode(content).decode()
            links = re.findall(r"(?:href|src)\s*=\s*\"([^\"]*)", picture)
            assert all(link.startswith("#") for link in links)


def test_a_page_without_cost_or_curve_renders() -> None:
    text = render(Page([make_row("fixed", 32, 32, 70.0, gflops=None, images_per_second=None)], {}, "digits/val"))
    assert "70.0" in text
    assert "Accuracy against time" not in text
    text = render(Page([make_row("none", 32, 32, None, note="too small")], {}, "digits/val"))
    assert "no curve: runs at fewer than two square sizes" in text
    assert "– could not run. none at 32: too small" in text


def markers(axes: Axes, colour: str) -> dict[int, bool]:
    """{x: filled} of the markers drawn in a colour."""
    found: dict[int, bool] = {}
    for line in axes.get_lines():
        if line.get_marker() not in ("", "None", None) and line.get_markeredgecolor() == colour:
            filled = line.get_markerfacecolor() == colour
            found.update({round(float(x)): filled for x in np.asarray(line.get_xdata())})
    return found


def test_training_sizes_are_filled_and_unseen_ones_hollow() -> None:
    figure = plots.accuracy_figure(rows(), {NAMES[0]: [24, 32], NAMES[1]: [32]})
    main, others = figure.axes
    assert markers(main, COLOURS[0]) == {16: False, 24: False, 32: True, 64: False}
    assert set(markers(main, COLOURS[1])) == {24, 32, 64}
    assert [tick.get_text() for tick in main.get_xticklabels()] == ["16", "24", "32", "64"]
    assert main.get_xscale() == "log"
    assert [tick.get_text() for tick in others.get_yticklabels()] == ["24×43\n16:9"]
    labels = [text.get_text() for text in main.texts]
    assert any(label.startswith("resformer_mr\n82.0 at 64") for label in labels)


def crowd(models: int, sides: tuple[int, ...]) -> list[Row]:
    """Curves that begin and end close to each other, with intervals."""
    made = []
    for number in range(models):
        for height, width in [*((side, side) for side in sides), (168, 299), (299, 168)]:
            score = 70.0 + number * (1 if height < 200 else 6)
            name = f"a model called {number}"
            made.append(make_row(name, height, width, score, low=score - 4, high=score + 4, trained=height == 224))
    return made


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("models", "sides"), [(1, (224,)), (3, (96, 224, 448)), (6, (64, 80, 96, 128, 224, 384, 640))])
def test_no_number_is_printed_over_another(models: int, sides: tuple[int, ...], narrow: bool) -> None:
    made = crowd(models, sides)
    trained = {row.model: [224] for row in made}
    figure = plots.accuracy_figure(made, trained, {made[0].model: {96: 71.0, 224: 75.0}}, narrow=narrow)
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in axes.texts]
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    (key,) = figure.legends
    boxes.append(("key", key.get_window_extent()))
    assert not [(one, two) for (one, a), (two, b) in combinations(boxes, 2) if a.shrunk(0.9, 0.8).overlaps(b)]
    assert not any(key.get_window_extent().overlaps(axes.bbox) for axes in figure.axes)


def test_every_model_has_its_own_training_sizes_interval_and_published_scores() -> None:
    made = crowd(2, (96, 224, 448))
    first, second = (f"a model called {number}" for number in range(2))
    figure = plots.accuracy_figure(made, {first: [96, 224], second: [448, 999]}, {second: {96: 50.0, 640: 60.0}})
    main = figure.axes[0]
    drawn: list[Any] = list(main.collections)
    points: list[Any] = [one for one in drawn if isinstance(one, PathCollection)]
    marks = {tuple(one.get_facecolor()[0]): one.get_offsets()[:, 0].tolist() for one in points}
    assert marks == {to_rgba(COLOURS[0]): [96, 224], to_rgba(COLOURS[1]): [448]}
    bands: list[Any] = [one for one in drawn if isinstance(one, PolyCollection)]
    assert {round(float(y)) for band in bands for y in band.get_paths()[0].vertices[:, 1]} >= {66, 67, 74, 75}
    lines: list[Any] = [line for line in main.get_lines() if line.get_marker() == "x"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines] == [(96, 50.0), (640, 60.0)]


def test_many_shapes_get_a_panel_for_each_ratio() -> None:
    many = [make_row("a", round(side * 0.75), round(side / 0.75), side / 10) for side in range(32, 320, 16)]
    many += [make_row("a", row.width, row.height, 50.0) for row in many]
    figure = plots.accuracy_figure([*many, make_row("a", 32, 32, 50.0), make_row("a", 64, 64, 60.0)], {})
    assert len(figure.axes) == 3


def test_front_is_what_nothing_beats() -> None:
    row = make_row("a", 32, 32, None)
    points = [(cost, score, row) for cost, score in ((1.0, 50.0), (2.0, 40.0), (2.0, 60.0), (3.0, 60.0), (0.5, 10.0))]
    assert [point[:2] for point in plots._front(points)] == [(0.5, 10.0), (1.0, 50.0), (2.0, 60.0)]


def test_pictures_are_written(tmp_path: Path) -> None:
    for number, figure in enumerate(
        (plots.accuracy_figure(rows(), {}, narrow=True), plots.pareto_figure(rows()), plots.cost_figure(rows(), {}))
    ):
        plots.save(figure, tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as image:
            assert image.width > 800
            darkest, lightest = image.convert("L").getextrema()
            assert darkest == pytest.approx(20, abs=20)
            assert lightest == 255


@pytest.mark.parametrize("kind", NASTY)
def test_pictures_and_pages_hold_any_name(kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    name = NASTY[kind]
    made = [make_row(label, side, side, 50.0 + side, note=name) for label in (name, name + "-", "b") for side in SIDES]
    made += [make_row(name, 24, 43, 61.0), make_row("b", 8, 8, None, note=name)]
    text = render(
        Page(made, {name: [(24, 24)]}, name, facts={"Command": name, name: name}, preparation={name: name}, bad=[name])
    )
    assert printable(text, keep="\n") == text
    assert text.encode()
    assert "<script" not in text
    assert "<img src=x" not in text
    assert f"<h3>{escape(shorten(printable(name), 80))}</h3>" in text
    assert text.count("<div class='card'") == 3
    assert len(text) < 3_000_000
    for number, figure in enumerate(
        (plots.accuracy_figure(made, {name: [24]}), plots.pareto_figure(made), plots.cost_figure(made, {}))
    ):
        plots.save(figure, tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as image:
            assert max(image.size) < 4000
    (legend,) = [legend for axes in figure.axes if (legend := axes.get_legend())]
    assert [entry.get_text() for entry in legend.get_texts()] == [
        drawn_name(label) for label in (name, name + "-", "b")
    ]
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
