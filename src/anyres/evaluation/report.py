"""One self-contained page for a sweep: the finding, the pictures, the tables and the fine print. No scripts, no
outside links.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape as escape_html
from typing import TYPE_CHECKING

from anyres.evaluation import plots
from anyres.evaluation.aspects import aspect_name, size_name
from anyres.evaluation.plot_style import model_colour
from anyres.evaluation.results import (
    SECOND_TITLES,
    SHORT_TITLES,
    TITLES,
    Row,
    Size,
    areas,
    find,
    main_score,
    score_names,
)
from anyres.io.text import printable, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image


@dataclass(frozen=True)
class Samples:
    """A few images of the source exactly as the network sees them at one size (after resize and crop, colours
    restored).
    """

    size: Size
    images: Sequence[Image.Image]


@dataclass(frozen=True)
class Page:
    """What the report shows. `facts` are (name, value) lines of the fine print, `preparation` says how images are
    made, by model.
    """

    rows: list[Row]
    train_sizes: Mapping[str, list[Size]]
    source: str
    facts: Mapping[str, str] = field(default_factory=dict)
    preparation: Mapping[str, str] = field(default_factory=dict)
    samples: Sequence[Samples] = ()
    bad: Sequence[str] = ()  # names and reasons of the skipped images


def escape(text: str) -> str:
    """Text as HTML, in an element or in a quoted attribute."""
    return escape_html(printable(text))


def render(page: Page) -> str:
    """The page as HTML text."""
    page = _with_short_names(page)
    rows, train_sizes = page.rows, dict(page.train_sizes)
    models = list(dict.fromkeys(row.model for row in rows))
    finding = find(rows, train_sizes)
    sides = {model: [height for height, width in sizes if height == width] for model, sizes in train_sizes.items()}
    counted = [row.count for row in rows if row.score is not None]
    images = f"{max(counted):,} images of {page.source}" if counted else page.source
    details = " ".join(finding.details)
    sections = [
        f"<header><p class='kicker'>{TITLES[main_score(rows)]} by input size · {escape(images)}</p>"
        f"<h1>{_keep_names_whole(finding.headline, models)}</h1>"
        f"<p class='lead'>{_keep_names_whole(details, models)}</p></header>",
        _cards(rows, models, train_sizes),
        _picture(
            plots.accuracy_figure(rows, sides),
            plots.accuracy_figure(rows, sides, narrow=True),
            f"{TITLES[main_score(rows)]} by input size. Filled markers and grey bands are sizes used in training; "
            "hollow markers are sizes that the model never saw. One set of weights for each curve.",
            _describe_curves(rows, models),
        ),
        _sample_strips(page.samples),
        "<h2>Accuracy at every size</h2>" + _accuracy_table(rows, models),
    ]
    if any(row.images_per_second for row in rows):
        sections += [
            "<h2>Accuracy against time</h2>",
            _picture(
                plots.pareto_figure(rows),
                plots.pareto_figure(rows, narrow=True),
                "Each point is one model at one square size. Up and to the left is better; on the grey line no other "
                "point is both faster and more accurate.",
                f"Scatter of {SHORT_TITLES[main_score(rows)]} against milliseconds per image; the numbers are in the "
                "last table.",
                "picture small",
            ),
            "<h2>Cost by size</h2>",
            _picture(
                plots.cost_figure(rows, sides),
                plots.cost_figure(rows, sides, narrow=True),
                "Measured speed, counted arithmetic and peak memory. Markers that enclose each other are equal.",
                "Images per second, GFLOP and memory by input size; the numbers are in the table below.",
            ),
            _cost_table(rows, models),
        ]
    sections.append(_fine_print(page, models))
    title = escape(f"{TITLES[main_score(page.rows)]} by input size: {', '.join(models)}")
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _with_short_names(page: Page) -> Page:
    """The page with models called by at most 80 letters, and by as many names as before."""
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
    )


def _keep_names_whole(text: str, models: list[str]) -> str:
    """Escaped text in which no line breaks inside a (short) model name, as browsers do at hyphens, or before a
    percent sign.
    """
    text = escape(text)
    for name in sorted((escape(model) for model in models if len(model) <= 24), key=len, reverse=True):
        text = text.replace(name, name.replace("-", "\u2011"))
    return text.replace(" %", "\u00a0%")


def _cards(rows: list[Row], models: list[str], train_sizes: dict[str, list[Size]]) -> str:
    means, sides = areas(rows)
    span = f"{sides[0]}–{sides[-1]} px" if sides else ""
    cards = []
    for index, model in enumerate(models):
        mean = means[model]
        params = next((row.params for row in rows if row.model == model and row.params), None)
        known = ", ".join(size_name(*size) for size in sorted(train_sizes.get(model, [])))
        trained = f"{known} px" if known else "unknown sizes"
        parameters = f" · {params / 1e6:.2f} M parameters" if params else ""
        value = f"{mean:.1f}<small> %</small>" if mean is not None else "–"
        meaning = (
            f"mean {SHORT_TITLES[main_score(rows)]} over log size, {span}"
            if mean is not None
            else "no curve: runs at fewer than two of the square sizes"
        )
        cards.append(
            f"<div class='card' style='--colour:{model_colour(index)}'><h3>{escape(model)}</h3>"
            f"<p class='number'>{value}</p><p>{meaning}</p><p>trained at {trained}{parameters}</p></div>"
        )
    return f"<div class='cards'>{''.join(cards)}</div>"


def _accuracy_table(rows: list[Row], models: list[str]) -> str:
    cells = {(row.size, row.model): row for row in rows}
    sizes = sorted({row.size for row in rows}, key=lambda size: (size[0] != size[1], size[0] * size[1], size))
    head = "".join(f"<th>{_swatch(index)}{escape(model)}</th>" for index, model in enumerate(models))
    second = next((name for name in score_names(rows) if name in SECOND_TITLES), "")
    lines = []
    for size in sizes:
        present = [cells[size, model] for model in models if (size, model) in cells]
        best = max((row.score for row in present if row.score is not None), default=None)
        marked = best if len(models) > 1 else None
        line = "".join(_accuracy_cell(cells.get((size, model)), marked, second) for model in models)
        shape = "" if size[0] == size[1] else f" <small>{aspect_name(*size)}</small>"
        lines.append(f"<tr><th scope='row'>{size_name(*size)}{shape}</th>{line}</tr>")
    notes = dict.fromkeys(f"{row.model} at {size_name(*row.size)}: {row.note}" for row in rows if row.score is None)
    remark = f"<p class='note'>– not possible. {escape('; '.join(notes))}</p>" if notes else ""
    left_out = "; ".join(dict.fromkeys(row.note for row in rows if row.score is not None and row.note))
    remark += f"<p class='note'>{escape(left_out)}.</p>" if left_out else ""
    brackets = f"<span class='wide'> ({SECOND_TITLES[second]} in brackets)</span>" if second else ""
    return (
        f"<div class='scroll'><table><thead><tr><th>size (px)</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        f"<p class='note'>{TITLES[main_score(rows)]} in percent{brackets}. ● trained at this size, ○ never seen in "
        f"training. Non-square sizes are height×width, ratios width:height.</p>{remark}"
    )


def _accuracy_cell(row: Row | None, best: float | None, second: str) -> str:
    if row is None:
        return "<td></td>"
    if row.score is None:
        return f"<td title='{escape(row.note)}'>–</td>"
    value = f"{row.score:.1f}"
    if row.score == best:
        value = f"<b>{value}</b>"
    other = f" <small>({row.scores[second]:.1f})</small>" if second in row.scores else ""
    return f"<td>{value}{other} <span class='dot'>{'●' if row.trained else '○'}</span></td>"


def _cost_table(rows: list[Row], models: list[str]) -> str:
    lines = []
    for index, model in enumerate(models):
        own = sorted(
            (row for row in rows if row.model == model and row.gflops is not None),
            key=lambda row: (not row.square, row.side),
        )
        if own:
            lines.append(
                f"<tr class='group'><th scope='rowgroup' colspan='7'>{_swatch(index)}{escape(model)}</th></tr>"
            )
        for row in own:
            lines.append(
                f"<tr><th scope='row'>{size_name(*row.size)}</th><td>{_digits(row.gflops)}</td>"
                f"<td>{_digits(row.gflops and row.gflops / 2)}</td><td>{_digits(row.images_per_second)}</td>"
                f"<td>{_digits(row.images_per_second and 1e3 / row.images_per_second)}</td>"
                f"<td>{_digits(row.latency_ms)}</td><td>{_digits(row.peak_memory_mb)}</td></tr>"
            )
    head = "".join(
        f"<th>{name}</th>"
        for name in ("size (px)", "GFLOP", "GMAC", "images/s", "ms/image", "latency (ms)", "memory (MB)")
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f"<div class='scroll'><table class='cost'>{body}</table></div>"


def _digits(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "–"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _sample_strips(samples: Sequence[Samples]) -> str:
    if not samples:
        return ""
    strips = []
    for group in samples:
        height, width = group.size
        tags = "".join(
            f"<img src='{_data_uri(_thumbnail(image), 'image/png')}' alt='' style='aspect-ratio:{width}/{height}'>"
            for image in group.images
        )
        strips.append(
            f"<figure class='strip'><figcaption>{size_name(height, width)} px</figcaption><div>{tags}</div></figure>"
        )
    return f"<h2>What the network sees</h2><div class='strips'>{''.join(strips)}</div>"


def _thumbnail(image: Image.Image) -> bytes:
    """PNG of at most 192 pixels a side; smaller images keep their own pixels, which the page shows as squares."""
    image = image.copy()
    image.thumbnail((192, 192))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _fine_print(page: Page, models: list[str]) -> str:
    rows = page.rows
    _, sides = areas(rows)
    items = []
    if sides:
        items.append(
            f"<b>Mean over log size</b>: area under the curve of {SHORT_TITLES[main_score(rows)]} over "
            f"log<sub>2</sub>(side), trapezoids, divided by the width of the range; over the square "
            f"sizes {', '.join(map(str, sides))} px, at which all curves have a value."
        )
    ways = dict.fromkeys(page.preparation.values())
    for way in ways:
        which = [model for model in models if page.preparation.get(model) == way]
        items.append(f"<b>Images</b>{'' if len(ways) == 1 else ' for ' + escape(', '.join(which))}: {escape(way)}")
    if any(row.gflops is not None for row in rows):
        items.append(
            "<b>FLOPs</b> = 2 × multiply-adds (papers often print GMAC); matrix products, convolutions and attention, "
            "fused attention included. <b>Images/s</b> from the median time of a batch, <b>latency</b> of one image "
            "alone, both after warm-up. <b>Memory</b>: weights, input and the largest sum of activations alive at one "
            "moment of a batch; on a GPU what the allocator handed out."
        )
    skipped = max((row.bad for row in rows), default=0)
    total = max((row.count for row in rows), default=0)
    if skipped:
        named = "; ".join(page.bad[:20]) + ("; …" if len(page.bad) > 20 else "")
        items.append(
            f"<b>Skipped</b>: {skipped} unreadable image{'s' * (skipped != 1)} beside {total:,} good ones"
            f"{': ' if named else ''}{escape(named)}. They count neither as right nor as wrong."
        )
    elif total:
        items.append("<b>Skipped</b>: no image.")
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in page.facts.items())
    points = "".join(f"<li>{item}</li>" for item in items)
    return f"<footer><h2>How this was measured</h2><ul>{points}</ul><dl>{facts}</dl></footer>"


def _picture(wide: Figure, narrow: Figure, caption: str, description: str, kind: str = "picture") -> str:
    """Two drawings of one picture: the page of a phone takes the narrow one, so that its letters stay readable."""
    return (
        f"<figure class='{kind}'><picture><source media='(max-width: 620px)' srcset='{_svg(narrow)}'>"
        f"<img src='{_svg(wide)}' alt='{escape(description)}'></picture>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _describe_curves(rows: list[Row], models: list[str]) -> str:
    """The curves in words, for those who do not see the picture."""
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


def _swatch(index: int) -> str:
    return f"<i class='swatch' style='background:{model_colour(index)}'></i>"


_STYLE = """
:root{color-scheme:light;--ink:#1a1a1a;--grey:#5f6368;--line:#e2e2e2}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1000px;margin:0 auto;padding:48px 24px 64px}
.kicker{margin:0 0 12px;color:var(--grey);font-size:14px}
h1{margin:0 0 16px;font-size:clamp(24px,4vw,36px);line-height:1.2;letter-spacing:-.015em;
text-wrap:balance;overflow-wrap:anywhere}
h2{margin:48px 0 12px;font-size:20px;line-height:1.3}
.lead{margin:0;max-width:72ch;color:#3c4043;font-size:17px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:16px;margin:32px 0}
.card{border-top:4px solid var(--colour);background:#f8f8f8;padding:14px 18px 16px}
.card h3{margin:0;font-size:15px;overflow-wrap:anywhere}
.card .number{margin:2px 0 4px;font-size:38px;line-height:1.15;font-weight:650;
color:var(--ink);font-variant-numeric:tabular-nums}
.card .number small{font-size:20px;font-weight:400}
.card p{margin:0;color:var(--grey);font-size:13.5px}
figure{margin:0}
.picture{margin:8px 0 0}
.picture.small{max-width:760px}
.picture img{display:block;width:100%;height:auto}
figcaption,.note{color:var(--grey);font-size:14px;max-width:80ch}
.picture figcaption{margin-top:8px}
.note{margin:8px 0 0}
.strips{display:grid;gap:14px}
.strip{display:grid;grid-template-columns:76px 1fr;align-items:center}
.strip div{display:flex;gap:8px;overflow:hidden}
.strip img{height:72px;flex:none;width:auto;image-rendering:pixelated;display:block}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:15px;min-width:min(100%,460px)}
table.cost{width:100%;font-size:14px}
th,td{padding:5px 14px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;font-weight:400}
thead th{font-weight:600;border-bottom:1.5px solid #9a9a9a;vertical-align:bottom}
tbody th{color:var(--ink)}
table.cost{margin-top:24px}
table.cost tr.group th{text-align:left;font-weight:600;padding-top:14px;border-bottom:1.5px solid #9a9a9a}
td small,th small{color:var(--grey)}
.dot{color:#9a9a9a;font-size:11px}
.swatch{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
footer{margin-top:48px;border-top:1.5px solid #9a9a9a;font-size:14px;color:#3c4043}
footer h2{margin-top:24px;font-size:16px}
footer ul{padding-left:18px;max-width:88ch}
footer li{margin:4px 0;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:16px 0 0}
dt{color:var(--grey)}
dd{margin:0;overflow-wrap:anywhere}
@media (max-width:620px){main{padding:24px 16px 40px}th,td{padding:5px 9px}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}
.strip{grid-template-columns:1fr}.strip img{height:56px}td small,.wide{display:none}}
@media print{@page{margin:14mm}body{font-size:11pt}main{max-width:none;padding:0}
.card{border:1px solid var(--line);border-top:4px solid var(--colour)}
figure,tr,.card,footer li{break-inside:avoid}h2{break-after:avoid}.scroll{overflow:visible}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""
