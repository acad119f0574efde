"""Evaluate one or several models at many input sizes, and write the table, the plots and the report.

Images are prepared as published: bicubic resize of the short side to int(size/crop_pct) (256/224 of the size unless
the model's data config has another crop_pct), then a centre crop. For a non-square size (H, W), the image is resized
to cover (H/crop_pct, W/crop_pct) before the centre crop of H×W, which applies the rule for squares to each side.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from anyres.data import MapSource, Source
from anyres.data.config import DataConfig
from anyres.data.kept import KeptImages, spread
from anyres.errors import UserError
from anyres.evaluation import plots
from anyres.evaluation.class_errors import class_errors
from anyres.evaluation.comparisons import Kept, compare, merged
from anyres.evaluation.cost import measure_cost, random_input
from anyres.evaluation.evaluate import evaluate, matching, preparation_text, process, sample_images
from anyres.evaluation.report import Page, Samples, render
from anyres.evaluation.results import Comparison, Finding, Row, areas, find, write_csv
from anyres.inference.identity import fingerprint, own_version
from anyres.io.files import atomic_write, check_files, locked
from anyres.shapes import Size
from anyres.tasks import task_of
from anyres.tasks.evidence import Evidence, unpack
from anyres.tasks.finite import check_weights
from anyres.tasks.scores import Measured

Progress = Callable[[Row, int, int], None]
_JOURNAL = "sweep.partial.jsonl"
_FILES = {"table": "sweep.csv", "picture": "sweep.png", "pareto": "pareto.png", "report": "report.html"}
_KIND = "sweep"
"""Name under which the folder's record lists these files (see `anyres.io.files`)."""


@dataclass(frozen=True)
class SweepResult:
    """The results of `sweep` and the files that it wrote."""

    rows: list[Row]
    """One row for each model and size; merged rows of several runs come after those of the runs."""
    train_sizes: dict[str, list[Size]]
    files: dict[str, Path] = field(default_factory=dict)  # "table", "picture", "pareto", "report"
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    evidence: Kept = field(default_factory=dict)
    """The predictions for every image, by (model, size), if the task keeps them."""

    @property
    def shown(self) -> list[Row]:
        """The rows to show, with those of several runs merged into one."""
        return merged([row for row in self.rows if row.model not in self.groups], self.groups)

    @property
    def areas(self) -> dict[str, float | None]:
        """Area under the curve of accuracy over log size in percent, by model (see `results.areas`)."""
        return areas(self.shown)[0]

    @property
    def comparisons(self) -> list[Comparison]:
        """The first model compared with each of the others, tested on the same images."""
        return compare(self.shown, self.evidence, self.groups)

    @property
    def finding(self) -> Finding:
        """The main result in words."""
        kind = next(iter(self.evidence.values()), None)
        test = kind.test if kind is not None else ""
        if kind is not None and self.groups:
            test = f"{test} (for several runs, {kind.test_of_runs} and a t-test over them)"
        return find(self.shown, self.train_sizes, self.comparisons, test)


def sweep(
    models: Mapping[str, nn.Module],
    source: Source,
    sizes: Sequence[Size],
    out: str | Path,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    workers: int = 0,
    images: int | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    cost: bool = True,
    cost_batch_size: int = 8,
    cost_seconds: float = 0.5,
    command: str | None = None,
    facts: Mapping[str, str] | None = None,
    published: plots.Published | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Evaluate every model at every size and write sweep.csv, sweep.png, pareto.png and report.html into `out`.

    If a model does not support a size, its row has no scores and a note with the reason. Rows are kept in a journal in
    `out` while the sweep runs, so that an interrupted sweep continues if it is started again with the same models,
    images, classes and settings. Under torch.distributed every process evaluates its share of the images, and the first
    one measures the cost and writes the files.

    Args:
        models: maps names to models whose `pretrained_cfg` has the preprocessing and `train_sizes`.
        source: an open data source.
        sizes: (height, width) of each size.
        out: folder for the results.
        images: number of images to evaluate, evenly spread over the classes (see `data.kept.spread`); None for all.
        groups: runs to show as one model, such as several seeds: name → names of the models.
        cost: also measure speed, FLOPs and memory.
        cost_batch_size: batch size of the cost measurement.
        cost_seconds: length of each of the two timings, in seconds.
        command: command line to show in the report; None for that of this process.
        facts: additional lines (name, value) at the end of the report.
        published: published main scores of models, by side; marked in the plots.
        progress: called with each row, its number and the total number of rows.

    Raises:
        UserError: before any work, if `out` is in use or contains files of these names that anyres did not write.
    """
    if not models or not sizes:
        raise UserError("a sweep needs at least one model and one size")
    device, out = torch.device(device), Path(out)
    sizes = list(dict.fromkeys((int(height), int(width)) for height, width in sizes))
    first = process()[0] == 0
    with locked(out) if first else nullcontext():
        if first:
            check_output(out)
        indices = None if images is None else spread(source, images)
        total = len(source) if isinstance(source, MapSource) else None
        taken = total if indices is None else len(indices)
        journal = _Journal(out / _JOURNAL, first)
        settings = [source.name, total, images, batch_size, precision, device.type,
                    cost and [cost_batch_size, cost_seconds], torch.__version__]  # fmt: skip
        kept = KeptImages()
        rows: list[Row] = []
        evidence: dict[tuple[str, Size], Evidence] = {}
        bad: dict[str, None] = {}
        for name, model in models.items():
            check_weights(model, name)
            identity = [name, fingerprint(model), preparation_text(model, source), matching(model, source), *settings]
            evaluation = _Evaluation(source, batch_size, device, precision, workers, indices,
                                     kept if task_of(model).kind == "image" else None)  # fmt: skip
            for size in sizes:
                key = json.dumps([identity, size])
                if key not in journal.rows:
                    costs = (cost_batch_size, cost_seconds) if cost and first else None
                    row, measured = _measure(name, model, evaluation, size, costs)
                    journal.add(key, dataclasses.replace(row, of=total), measured.evidence if measured else None)
                    bad.update(dict.fromkeys(measured.bad_images if measured else ()))
                row, seen = journal.rows[key]
                if seen is not None:
                    evidence[name, size] = seen
                rows.append(row)
                if progress is not None and first:
                    progress(row, len(rows), len(models) * len(sizes))
            model.to("cpu")
        train_sizes = {name: list(DataConfig.of(model).train_sizes) for name, model in models.items()}
        groups = groups or {}
        train_sizes |= {group: train_sizes[runs[0]] for group, runs in groups.items()}
        together = [row for row in merged(rows, groups) if row.model in groups]
        result = SweepResult([*rows, *together], train_sizes, groups=groups, evidence=evidence)
        if not first:
            return result
        share = "" if taken == total else f" (of {total:,}, evenly spread over the classes)"
        lines = {
            "Command": command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            **(facts or {}),
            **({"Images": f"{taken:,}{share}"} if share else {}),
            "Software": f"anyres {own_version()}, torch {torch.__version__}, Python {platform.python_version()}",
            "Hardware": f"{_hardware(device)}, {precision}",
            "Batches": f"{batch_size} images for accuracy"
            + (f", {cost_batch_size} for speed and memory" if cost else ""),
            "Date": time.strftime("%Y-%m-%d %H:%M"),
        }
        preparation = {name: preparation_text(model, source) for name, model in models.items()}
        page = Page(
            rows=result.shown,
            train_sizes=result.train_sizes,
            source=source.name + share,
            finding=result.finding,
            facts=lines,
            published=published or {},
            preparation=preparation | {group: preparation[runs[0]] for group, runs in groups.items()},
            samples=[
                Samples(size, sample_images(next(iter(models.values())), source, size, 6, indices))
                for size in _sample_sizes(rows)
            ],
            bad=list(bad),
            errors=class_errors(
                [groups.get(name, [name]) for name in dict.fromkeys(row.model for row in result.shown)],
                models,
                evidence,
                sizes,
                source,
                indices,
            ),
        )
        files = write_outputs(page, out, result.rows)
        journal.remove()
        return dataclasses.replace(result, files=files)


def check_output(out: str | Path) -> None:
    """Raise UserError if a sweep would overwrite files in the folder that anyres did not write."""
    check_files(out, _KIND, [*_FILES.values(), _JOURNAL])


def write_outputs(page: Page, out: str | Path, rows: list[Row]) -> dict[str, Path]:
    """Write the table of `rows`, and both plots and the report of `page`, atomically, and return their paths."""
    out = Path(out)
    files = {what: out / name for what, name in _FILES.items()}
    sides = {model: [height for height, width in sizes if height == width] for model, sizes in page.train_sizes.items()}
    write_csv(rows, files["table"])
    with atomic_write(files["picture"], _KIND) as temporary:
        plots.save(plots.accuracy_figure(page.rows, sides, page.published), temporary)
    if any(row.images_per_second for row in page.rows):
        with atomic_write(files["pareto"], _KIND) as temporary:
            plots.save(plots.pareto_figure(page.rows), temporary)
    else:
        del files["pareto"]
    with atomic_write(files["report"], _KIND) as temporary:
        temporary.write_text(render(page), encoding="utf-8")
    return files


@dataclass(frozen=True)
class _Evaluation:
    """The data and the settings of an evaluation."""

    source: Source
    batch_size: int
    device: torch.device
    precision: str
    workers: int
    indices: list[int] | None
    kept: KeptImages | None


def _measure(
    name: str, model: nn.Module, about: _Evaluation, size: Size, cost_settings: tuple[int, float] | None
) -> tuple[Row, Measured | None]:
    """Return a row, and the scores if the model runs at the size."""
    params = sum(parameter.numel() for parameter in model.parameters())
    row = Row(name, *size, size in DataConfig.of(model).train_sizes, {}, 0, 0, None, params, None, None, None)
    device, precision = about.device, about.precision
    try:
        _try_size(model.to(device).eval(), size, device)
        measured = evaluate(
            model, about.source, size, about.batch_size, device, precision,
            workers=about.workers, indices=about.indices, kept=about.kept,
        )  # fmt: skip
    except _RefusedSizeError as error:
        return dataclasses.replace(row, note=str(error)), None
    except torch.OutOfMemoryError:
        if process()[1] > 1:  # the other processes wait for this one's counts
            raise
        return dataclasses.replace(row, note=f"out of memory in batches of {about.batch_size}"), None
    row = dataclasses.replace(
        row, scores=measured.scores, count=measured.count, bad=len(measured.bad_images), note=measured.note
    )
    if measured.evidence is not None:
        low, high = measured.evidence.interval()
        row = dataclasses.replace(row, low=low, high=high)
    if cost_settings is not None:
        try:
            cost = measure_cost(model, size, cost_settings[0], device, precision, cost_settings[1])
            row = dataclasses.replace(
                row,
                gflops=cost.gflops,
                images_per_second=cost.images_per_second,
                latency_ms=cost.latency_ms,
                peak_memory_mb=cost.peak_memory_mb,
            )
        except torch.OutOfMemoryError:
            memory = f"cost: out of memory in batches of {cost_settings[0]}"
            row = dataclasses.replace(row, note="; ".join(filter(None, [row.note, memory])))
    return row, measured


class _RefusedSizeError(Exception):
    """A model does not support a size."""


def _try_size(model: nn.Module, size: Size, device: torch.device) -> None:
    """Run a blank image to tell an unsupported size from other errors during evaluation."""
    blank = random_input(model, 1, size, device).zero_()
    try:
        DataConfig.of(model).check_size(size)  # some heads enlarge small images
        with torch.inference_mode():
            model(blank)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, AssertionError, RuntimeError) as error:  # what models raise for an unsupported size
        lines = str(error).strip().splitlines()
        raise _RefusedSizeError(lines[0][:200] if lines else type(error).__name__) from error


class _Journal:
    """The rows measured so far, one JSON line each. The first process reads and writes the file for all processes."""

    def __init__(self, path: Path, writes: bool) -> None:
        self._path, self._writes = path, writes
        found = [self._read() if writes else {}]
        if process()[1] > 1:  # all must skip the same rows
            dist.broadcast_object_list(found)
        self.rows: dict[str, tuple[Row, Evidence | None]] = found[0]

    def _read(self) -> dict[str, tuple[Row, Evidence | None]]:
        rows: dict[str, tuple[Row, Evidence | None]] = {}
        if not self._path.exists():
            return rows
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                seen = entry["evidence"]
                rows[entry["key"]] = Row(**entry["row"]), None if seen is None else unpack(seen)
            except (ValueError, TypeError, KeyError, zlib.error):  # written by another version
                continue
        return rows

    def add(self, key: str, row: Row, evidence: Evidence | None) -> None:
        self.rows[key] = row, evidence
        if self._writes:
            lines = [
                json.dumps({"key": key, "row": dataclasses.asdict(row), "evidence": seen and seen.pack()})
                for key, (row, seen) in self.rows.items()
            ]
            with atomic_write(self._path, _KIND) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _sample_sizes(rows: list[Row]) -> list[Size]:
    """Return the sizes whose images the report shows.

    These are the smallest, a training size (or one in the middle), the largest and one non-square size.
    """
    squares = sorted({row.size for row in rows if row.square})
    others = [row.size for row in rows if not row.square]
    trained = sorted({row.size for row in rows if row.square and row.trained})
    middle = trained[-1:] or squares[len(squares) // 2 :][:1]
    return list(dict.fromkeys([*squares[:1], *middle, *squares[-1:], *others[:1]]))


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():  # Linux: platform names only the architecture
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
