"""The report of a sweep: a self-contained HTML page with results, plots, tables and the method.

The page has no external links. Its only script filters the errors by size in the browser. Names are passed to the
script as data and to the page as text.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from anyres.evaluation import plots
from anyres.evaluation.aspects import aspect_name, size_name
from anyres.evaluation.plot_style import model_colour
from anyres.evaluation.results import (
    PART_TITLES,
    SECOND_TITLES,
    SHORT_TITLES,
    TITLES,
    Finding,
    Row,
    areas,
    find,
    main_score,
    score_names,
)
from anyres.io.text import printable, shorten
from anyres.shapes import Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image


@dataclass(frozen=True)
class Samples:
    """A few images of the source as the network sees them at one size (resized and cropped, but not normalised)."""

    size: Size
    images: Sequence[Image.Image]


@dataclass(frozen=True)
class Page:
    """The contents of the report.

    `facts` are (name, value) lines at the end of the page; `preparation` describes the eval transform of each model.
    """

    rows: list[Row]
    train_sizes: Mapping[str, list[Size]]
    source: str
    finding: Finding | None = None  # by default computed from the rows alone
    facts: Mapping[str, str] = field(default_factory=dict)
    preparation: Mapping[str, str] = field(default_factory=dict)
    published: plots.Published = field(default_factory=dict)
    samples: Sequence[Samples] = ()
    bad: Sequence[str] = ()  # names of the skipped images, with reasons
    errors: Mapping[str, Any] | None = None  # as in `class_errors`


def render(page: Page) -> str:
    """Render the page as HTML with the template `report.html`."""
    page = _with_short_names(page)
    rows, train_sizes = page.rows, dict(page.train_sizes)
    names = list(dict.fromkeys(row.model for row in rows))
    models = [{"name": name, "colour": model_colour(index)} for index, name in enumerate(names)]
    finding = page.finding or find(rows, train_sizes)
    sides = {model: [height for height, width in sizes if height == width] for model, sizes in train_sizes.items()}
    totals = [row.count for row in rows if row.score is not None]
    means, curve_sides = areas(rows)
    second = next((name for name in score_names(rows) if name in SECOND_TITLES), "")
    timed = any(row.images_per_second for row in rows)
    ways = dict.fromkeys(page.preparation.values())
    return _template().render(
        models=models,
        score=TITLES[main_score(rows)],
        short_score=SHORT_TITLES[main_score(rows)],
        images=f"{max(totals):,} images of {page.source}" if totals else page.source,
        headline=_keep_names_whole(finding.headline, names),
        lead=_keep_names_whole(" ".join(finding.details), names),
        cards=[
            {
                "model": model,
                "mean": means[name],
                "trained": [size_name(*size) for size in sorted(train_sizes.get(name, []))],
                "params": next((row.params for row in rows if row.model == name and row.params), None),
            }
            for name, model in zip(names, models, strict=True)
        ],
        curve_sides=curve_sides,
        accuracy=_picture(plots.accuracy_figure, rows, sides, page.published),
        curves=_describe_curves(rows, names),
        strips=[
            {
                "size": size_name(*group.size),
                "ratio": f"{group.size[1]}/{group.size[0]}",
                "images": [_data_uri(_thumbnail(image), "image/png") for image in group.images],
            }
            for group in page.samples
        ],
        accuracy_lines=_accuracy_lines(rows, names),
        second=second,
        second_title=SECOND_TITLES.get(second),
        refusals=dict.fromkeys(
            f"{row.model} at {size_name(*row.size)}: {row.note}" for row in rows if row.score is None
        ),
        remarks=dict.fromkeys(row.note for row in rows if row.score is not None and row.note),
        pareto=_picture(plots.pareto_figure, rows) if timed else None,
        cost=_picture(plots.cost_figure, rows, sides) if timed else None,
        cost_groups=_cost_groups(rows, models),
        ways=[{"text": way, "models": [name for name in names if page.preparation.get(name) == way]} for way in ways],
        counted=any(row.gflops is not None for row in rows),
        skipped=max((row.bad for row in rows), default=0),
        total=max((row.count for row in rows), default=0),
        bad=page.bad,
        parts=_parts(rows, names),
        errors=page.errors and {**page.errors, "models": names},
        facts=page.facts,
    )


@cache
def _template() -> Template:
    """Load the template, in an environment that makes every value printable and escapes it as text."""
    environment = Environment(
        loader=PackageLoader("anyres", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printed,
    )
    environment.filters["digits"] = _digits
    return environment.get_template("report.html")


def _printed(value: Any) -> Any:
    # Markup comes from the template's own macros, whose values were already escaped here.
    return value if isinstance(value, Markup) else printable(str(value))


def _with_short_names(page: Page) -> Page:
    """Return the page with model names shortened to about 80 characters; different names stay different."""
    short: dict[str, str] = {}
    for model in dict.fromkeys(row.model for row in page.rows):
        name = shorten(printable(model), 80)
        while name in short.values():
            name += "'"
        short[model] = name
    return replace(
        page,
        rows=[replace(row, model=short[row.model]) for row in page.rows],
        train_sizes={short.get(model, model): sizes for model, sizes in page.train_sizes.items()},
        preparation={short.get(model, model): way for model, way in page.preparation.items()},
        published={short.get(model, model): scores for model, scores in page.published.items()},
    )


def _keep_names_whole(text: str, models: list[str]) -> str:
    """Prevent line breaks at the hyphens of (short) model names and before percent signs."""
    for name in sorted((model for model in models if len(model) <= 24), key=len, reverse=True):
        text = text.replace(name, name.replace("-", "\u2011"))
    return text.replace(" %", "\u00a0%")


def _accuracy_lines(rows: list[Row], models: list[str]) -> list[dict[str, Any]]:
    """Return a table line for each size, square sizes first, with a `Row` or None for each model."""
    cells = {(row.size, row.model): row for row in rows}
    sizes = sorted({row.size for row in rows}, key=lambda size: (size[0] != size[1], size[0] * size[1], size))
    return [
        {
            "size": size_name(*size),
            "shape": "" if size[0] == size[1] else aspect_name(*size),
            "rows": (line := [cells.get((size, model)) for model in models]),
            # Only marked if there are several models to compare.
            "best": max((row.score for row in line if row is not None and row.score is not None), default=None)
            if len(models) > 1
            else None,
        }
        for size in sizes
    ]


def _parts(rows: list[Row], models: list[str]) -> list[dict[str, Any]]:
    """Return a table for each model that has scores for parts of the data: one line per part, one cell per size."""
    found = []
    for model in models:
        own = [row for row in rows if row.model == model and row.score is not None]
        names = [name for name in PART_TITLES if any(name in row.scores for row in own)]
        if names:
            lines = [{"title": PART_TITLES[name], "cells": [row.scores.get(name) for row in own]} for name in names]
            found.append({"model": model, "sizes": [size_name(*row.size) for row in own], "lines": lines})
    return found


def _cost_groups(rows: list[Row], models: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return the lines of the cost table, grouped by model; models without measurements are left out."""
    groups = []
    for model in models:
        own = sorted(
            (row for row in rows if row.model == model["name"] and row.gflops is not None),
            key=lambda row: (not row.square, row.side),
        )
        lines = [
            {
                "size": size_name(*row.size),
                "numbers": [
                    row.gflops,
                    row.gflops and row.gflops / 2,
                    row.images_per_second,
                    row.images_per_second and 1e3 / row.images_per_second,
                    row.latency_ms,
                    row.peak_memory_mb,
                ],
            }
            for row in own
        ]
        if lines:
            groups.append({"model": model, "lines": lines})
    return groups


def _digits(value: float | None) -> str:
    """Format a number with three significant digits and no exponent."""
    if value is None:
        return "–"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _thumbnail(image: Image.Image) -> bytes:
    """Encode as PNG with at most 192 pixels per side; smaller images keep their size, and the page shows their
    pixels."""
    image = image.copy()
    image.thumbnail((192, 192))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _picture(draw: Callable[..., Figure], *about: Any) -> dict[str, str]:
    """Draw a figure in a wide and a narrow layout, as data URIs."""
    return {"wide": _svg(draw(*about)), "narrow": _svg(draw(*about, narrow=True))}


def _describe_curves(rows: list[Row], models: list[str]) -> str:
    """Describe the curves in words, as the alternative text of the plot."""
    parts = []
    for model in models:
        points = sorted(
            (row.height, row.score) for row in rows if row.model == model and row.square and row.score is not None
        )
        parts.append(f"{model}: " + ", ".join(f"{value:.1f} % at {side}" for side, value in points))
    return ". ".join(parts)


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    plots.save(figure, buffer, "svg")
    return _data_uri(buffer.getvalue(), "image/svg+xml")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
