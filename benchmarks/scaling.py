"""Accuracy by input size of training methods that cost the same.

    uv run python benchmarks/scaling.py run results letters /data/icons --seeds 0 1 2
    uv run python benchmarks/scaling.py tune results letters /data/icons
    uv run python benchmarks/scaling.py table benchmarks/results --into docs/science.md

`run` trains every method on every dataset with every seed, and evaluates the averaged last weights at ten square sizes
from 0.3 to 4 times the largest training size and at two aspect ratios. All methods have the same augmentation,
optimiser and schedule, and by default the same training arithmetic: `--views` images at the largest size, or what costs
as much (`--equal epochs`: as many passes over the images, as in the ResFormer paper). Runs that are in the folder
already are not repeated. `tune` compares learning rates on a tenth of the training images, which is never reported.
`table` prints the mean over seeds and the mean over the logarithm of the size with its 95 % interval over seeds, and
marks differences from the first method that a paired test over images finds, corrected for the number of sizes (Holm).
With --into, it replaces what stands between the lines `<!-- results -->` and `<!-- end of results -->` of a file.

Datasets are `letters` or image folders with train and val; benchmarks/drawings.py makes two.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import shlex
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from anyres.allocator import keep_memory
from anyres.data.kept import KeptImages
from anyres.data.schedule import SizeSchedule
from anyres.evaluation import evaluate
from anyres.evaluation.cost import count_flops
from anyres.evaluation.evaluate import open_test_source
from anyres.models._registry import create_model
from anyres.tasks import load_pretrained
from anyres.tasks.evidence import holm
from anyres.training import load_config, train

TOP = 64
SIDES = (20, 24, 32, 40, 48, 64, 96, 128, 192, 256)
ASPECTS = ((48, 85), (85, 48))
SIZES = (*((side, side) for side in SIDES), *ASPECTS)
NETWORK = {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2, "img_size": TOP}
COMMON: dict[str, Any] = {
    "model": "resformer_tiny",
    "model_args": NETWORK,
    "init": "scaled",
    "sizes": [64, 48, 40],
    "batch_size": 32,
    "optimizer": "muon",
    "lr": 1e-2,
    "weight_decay": 0.05,
    "warmup_lr": 1e-5,
    "min_lr": 1e-5,
    "drop_path": 0.0,
    "ema_decay": 0.99,
    "ema_warmup": True,
    "smoothing": 0.1,
    "mixup": 0,
    "cutmix": 0,
    "crop_scale": [0.25, 2.0],
    "crop_fill": "border",
    "hflip": 0,
    "auto_augment": None,
    "color_jitter": 0,
    "erasing": 0,
    "eval_every": 0,
    "precision": "float32",
    "device": "cpu",
    "workers": 0,
    "progress": False,
}
PLAIN = ("deit_tiny", "resformer_tiny")
SAMPLE = {"mode": "sample", "distillation": "none"}
ADAMW = {"optimizer": "adamw", "lr": 3e-3}
LADDER = [64, 56, 48, 40, 32, 24]


def positioned(name: str, **parts: Any) -> dict[str, Any]:
    return {"model_args": {**NETWORK, "position": name, **({"position_args": parts} if parts else {})}}


ANY_SIZE = {**SAMPLE, "sizes": LADDER, **positioned("pape", local=True)}
"""The recipe any_size."""
METHODS: dict[str, dict[str, Any]] = {
    "single": {"sizes": [TOP], "model": "deit_tiny", "distillation": "none"},
    "single rlpe": {"sizes": [TOP], "distillation": "none", **positioned("rlpe")},
    "single pape": {"sizes": [TOP], "distillation": "none", **positioned("pape")},
    "single, AdamW": {"sizes": [TOP], "model": "deit_tiny", "distillation": "none", **ADAMW},
    "published": {},
    "published pape": positioned("pape"),
    "replicate": {"distillation": "none"},
    "sample": SAMPLE,
    "sample rope": {**SAMPLE, **positioned("rope")},
    "sample rlpe": {**SAMPLE, **positioned("rlpe")},
    "sample rlpe, no log scale": {**SAMPLE, **positioned("rlpe", log_scale=None)},
    "sample rlpe, no jitter": {**SAMPLE, **positioned("rlpe", jitter=None)},
    "sample pape": {**SAMPLE, **positioned("pape")},
    "sample fire": {**SAMPLE, **positioned("fire")},
    "sample lookhere": {**SAMPLE, **positioned("lookhere")},
    "pair pape": {"mode": "sample", "sizes_per_step": 2, **positioned("pape")},
    "pair pape, late": {"mode": "sample", "sizes_per_step": 2, "distillation_start": 0.5, **positioned("pape")},
    "wide rlpe": {**SAMPLE, "sizes": LADDER, **positioned("rlpe")},
    "wide pape": {**SAMPLE, "sizes": LADDER, **positioned("pape")},
    "any_size": ANY_SIZE,
    "any_size, curriculum": {**ANY_SIZE, "curriculum": True},
    "any_size, crops 0.1-3": {**ANY_SIZE, "crop_scale": [0.1, 3.0]},
    "any_size, AdamW": {**ANY_SIZE, **ADAMW},
}
WIDTHS = {"embed_dims": (32, 48, 64, 96), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 3), "mlp_ratios": (2, 2, 2, 2)}
PYRAMIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny", {"embed_dim": 16, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 4, 8)}),
    "pvt_v2": ("pvt_v2_b1", WIDTHS),
    "cvt": ("cvt_13", {"embed_dims": (32, 48, 96), "depths": (1, 1, 2), "num_heads": (1, 2, 3), "mlp_ratio": 2}),
}
for system, (model, arguments) in PYRAMIDS.items():
    network = {"model": model, "model_args": arguments}
    METHODS[f"{system}, single"] = {**network, "sizes": [TOP], "distillation": "none"}
    METHODS[f"{system}, published"] = network
    METHODS[f"{system}, any_size"] = {**network, **SAMPLE, "sizes": LADDER[:-1]}
RATES = (3e-3, 1e-2, 3e-2)
RESULTS = ("<!-- results -->", "<!-- end of results -->")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "tune", "table"))
    parser.add_argument("results", type=Path, help="folder of the results, a file for each run")
    parser.add_argument("data", nargs="*", help="datasets; by default letters, for a table all")
    parser.add_argument("--methods", nargs="*", default=["single", "published", "sample"], help=f"of {list(METHODS)}")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--views", type=float, default=100_000, help="cost of a run: images at the largest size")
    parser.add_argument("--equal", choices=("arithmetic", "epochs"), default="arithmetic")
    parser.add_argument("--lr", type=float, help="of every method, instead of 1e-2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--into", type=Path, help="Markdown file for the tables, instead of stdout")
    options = parser.parse_args()
    if unknown := set(options.methods) - set(METHODS):
        parser.error(f"there is no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    if options.action == "table":
        found = "\n".join(tables(options.results, options.data))
        if options.into is None:
            print(found)
        else:
            options.into.write_text(with_results(options.into.read_text(), found))
        return
    torch.set_num_threads(options.threads)
    keep_memory()
    rates = RATES if options.action == "tune" else (options.lr,)
    for data in options.data or ["letters"]:
        for seed in options.seeds:
            for method in options.methods:
                for rate in rates:
                    run(options.results, data, method, seed, options.views, options.equal, rate, options.action)


# Running --------------------------------------------------------------------------------------------------------------


def run(
    results: Path, data: str, method: str, seed: int, views: float, equal: str, rate: float | None, action: str
) -> None:
    """Train and evaluate, and write what came of it, unless it is there."""
    place = Path(data)
    changes = {**METHODS[method], **({} if rate is None else {"lr": rate})}
    # A folder of classes gives a tenth of itself for validation.
    used = str(place / "train") if action == "tune" and place.is_dir() else data
    config = load_config({**COMMON, **changes, "data": used, "seed": seed})
    slug = re.sub(r"[^a-z0-9.]+", "-", method.lower())
    name = "_".join([place.name, slug, f"{views:g}", equal, f"{config.lr:g}", str(seed), action])
    file = results / f"{name}.json"
    if file.exists():
        return
    images = training_images(used)
    epochs, cost = length(config, images, views, equal)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        config = config.changed(output=str(output), epochs=epochs, warmup_epochs=0.1 * epochs)
        began, cpu = time.monotonic(), time.process_time()
        status = train(config).status
        if status != "finished":
            raise SystemExit(f"{name} was stopped ({status}) and is not recorded")
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu
        model = load_pretrained(output / "last_ema")
    source = open_test_source(model, used)
    kept = KeptImages()
    right = {}
    for size in SIZES[5:6] if action == "tune" else SIZES:
        if min(size) < model.minimum_size:
            continue
        answers: Any = evaluate(model, source, size, 130, kept=kept).evidence
        right["x".join(map(str, size))] = "".join(map(str, (answers.truth == answers.predicted).astype(int)))
    found = {
        "data": place.name,
        "method": method,
        "seed": seed,
        "views": views,
        "equal": equal,
        "action": action,
        "command": shlex.join(
            [
                *("benchmarks/scaling.py", action, "RESULTS", place.name, "--methods", method, "--seeds", str(seed)),
                *("--views", f"{views:g}", "--equal", equal, *(() if rate is None else ("--lr", f"{rate:g}"))),
            ]
        ),
        "options": {key: value for key, value in config.to_dict().items() if key not in ("output", "data")},
        "images": images,
        "epochs": epochs,
        "teraflops": cost,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "right": right,
    }
    results.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(found))
    shutil.move(temporary, file)
    shown = "  ".join(f"{size} {100 * bits.count('1') / len(bits):.1f}" for size, bits in right.items())
    print(f"{name}: {epochs} epochs, {seconds:.0f} s, {cost:.1f} TFLOP | {shown}", flush=True)


def training_images(data: str) -> int:
    from anyres.data import open_source

    source: Any = open_source(data, "train")
    return len(source)


def length(config: Any, images: int, views: float, equal: str) -> tuple[int, float]:
    """(epochs, training arithmetic in TFLOP), three times that of the forward passes.

    The unit is an image at the largest size in the network of `single`, or for pyramids in the same network.
    """
    model: Any = create_model(config.model, **config.model_args, num_classes=26).eval()
    flops = {shape: count_flops(model, torch.zeros(1, 3, *shape)) for shape in config.shapes}
    single: Any = create_model("deit_tiny", **NETWORK, num_classes=26).eval() if config.model in PLAIN else model
    unit = count_flops(single, torch.zeros(1, 3, TOP, TOP))
    steps = images // config.batch_size

    def total(epochs: int) -> float:
        schedule = config.changed(epochs=epochs, warmup_epochs=0).build(SizeSchedule, sizes=config.shapes)
        places = ((epoch, epoch * steps + step) for epoch in range(epochs) for step in range(steps))
        return config.batch_size * sum(flops[shape] for place in places for shape in schedule.sizes(*place))

    epochs = max(1, round(views / images))
    if equal == "arithmetic":
        for _ in range(4):  # the mean cost of an epoch may depend on their number
            epochs = max(1, round(epochs * views * unit / total(epochs)))
    return epochs, 3 * total(epochs) / 1e12


# Tables ---------------------------------------------------------------------------------------------------------------


def with_results(text: str, found: str) -> str:
    """Return a document with other results."""
    before, start, rest = text.partition(RESULTS[0])
    _, end, after = rest.partition(RESULTS[1])
    return f"{before}{start}\n{found}\n{end}{after}"


def tables(results: Path, data: Sequence[str]) -> Iterator[str]:
    """The lines of a table for each dataset and cost."""
    runs: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(results.glob("*.json")):
        found = json.loads(file.read_text())
        if not data or found["data"] in {Path(each).name for each in data}:
            system = found["method"].partition(", ")[0]
            key = (
                *(found[name] for name in ("action", "data", "equal", "views")),
                system if system in PYRAMIDS else "",
            )
            rate = f" lr {found['options']['lr']:g}" if found["action"] == "tune" else ""
            runs[key][found["method"] + rate].append(found)
    order = list(METHODS)
    for (action, name, equal, views, system), methods in sorted(runs.items()):
        ranked = sorted(methods, key=lambda method: (order.index(method.partition(" lr ")[0]), method))
        sizes = list(methods[ranked[0]][0]["right"])
        counts = {len(bits) for found in methods.values() for each in found for bits in each["right"].values()}
        title = ", ".join(filter(None, [name, system, f"equal {equal}", "learning rates" * (action == "tune")]))
        yield f"\n### {title}: {views:,.0f} views at {TOP} px\n"
        area = ["mean over log size"] if action == "run" else []
        yield "|".join(["| method | seeds | epochs | TFLOP | minutes | MB ", *sizes, *area, ""])
        yield "|".join(["|---|--:|--:|--:|--:|--:", *["--:"] * (len(sizes) + len(area)), ""])
        for method in ranked:
            yield row(methods[method], methods[ranked[0]], sizes, area)
        counted = ", ".join(map(str, counts))
        yield f"\n{counted} validation images. + and −: above and below the first line (paired, 5 %)."


def row(found: list[dict[str, Any]], first: list[dict[str, Any]], sizes: Sequence[str], area: Sequence[str]) -> str:
    scores = np.array([[100 * np.mean(bits(each, size)) for size in sizes] for each in found])
    marks = [""] * len(sizes)
    if found is not first:
        tests = [paired(found, first, size) for size in sizes]
        for place, p in enumerate(holm([p for p, _ in tests])):
            marks[place] = ("+" if tests[place][1] > 0 else "−") if p < 0.05 else ""
    cells = [f"{score:.1f}{mark}" for score, mark in zip(scores.mean(0), marks, strict=True)]
    if area:
        squares = [place for place, size in enumerate(sizes) if len({*size.split("x")}) == 1]
        logs = np.log([int(sizes[place].split("x")[0]) for place in squares])
        means = [float(np.trapezoid(line[squares], logs) / (logs[-1] - logs[0])) for line in scores]
        cells.append(f"**{np.mean(means):.1f}**{interval(means)}")
    facts = [np.mean([each[name] for each in found]) for name in ("epochs", "teraflops", "cpu_seconds", "peak_gib")]
    about = [f"{facts[0]:.0f}", f"{facts[1]:.1f}", f"{facts[2] / 60:.1f}", f"{facts[3] * 1024:.0f}"]
    seeds = ", ".join(str(each["seed"]) for each in found)
    return f"| {' | '.join([label(found), seeds, *about, *cells])} |"


def label(found: list[dict[str, Any]]) -> str:
    rate = f" lr {found[0]['options']['lr']:g}" if found[0]["action"] == "tune" else ""
    return f"{found[0]['method']}{rate}"


def bits(found: dict[str, Any], size: str) -> np.ndarray:
    return np.frombuffer(found["right"][size].encode(), dtype=np.uint8) - ord("0")


def paired(one: list[dict[str, Any]], other: list[dict[str, Any]], size: str) -> tuple[float, float]:
    """(p, mean difference) of the share of seeds that are right about each image: Wilcoxon's signed-rank test."""
    means = [np.mean([bits(each, size) for each in found], axis=0) for found in (one, other)]
    difference = means[0] - means[1]
    if not difference.any():
        return 1.0, 0.0
    return float(stats.wilcoxon(difference).pvalue), float(difference.mean())


def interval(values: Sequence[float]) -> str:
    """Half of the 95 % interval of the mean (Student's t), where there are several."""
    if len(values) < 2:
        return ""
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f" ± {stats.t.ppf(0.975, len(values) - 1) * spread:.1f}"


if __name__ == "__main__":
    main()
