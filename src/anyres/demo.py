"""The main result on built-in data: one checkpoint that holds its accuracy at every size, beside one that does not."""

from __future__ import annotations

import sys
from pathlib import Path

from anyres.data import open_source
from anyres.evaluation import SweepResult, sweep
from anyres.registry import load_pretrained
from anyres.training import load_config, train

RUNS = {
    "ResFormer": "digits",
    "ResFormer, rotary": "digits_rlpe",
    "DeiT, one size": "digits_deit",
}
"""Name in the pictures → recipe."""

SIZES = [(side, side) for side in (10, 12, 15, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96)] + [(24, 30), (40, 32)]
"""Half the smallest to three times the largest training size, and two shapes that are not square."""


def run_demo(
    output: Path, epochs: int | None = None, seed: int = 0, device: str = "auto", rotary: bool = True
) -> SweepResult:
    """Train the networks of `RUNS` under `output`, evaluate all at `SIZES`, and write the report into `output /
    "report"`.

    `epochs` replaces the recipes' number; the comparison keeps as many image views as the multi-resolution runs have.
    Runs that are finished already are not trained again.
    """
    models = {}
    runs = {name: recipe for name, recipe in RUNS.items() if rotary or recipe != "digits_rlpe"}
    for number, (name, recipe) in enumerate(runs.items(), 1):
        options = {"output": str(output / recipe), "seed": seed, "device": device, "progress": sys.stderr.isatty()}
        config = load_config(recipe, **options)
        if epochs is not None:
            views = len(load_config("digits").shapes) // len(config.shapes)
            config = load_config(recipe, **options, epochs=epochs * views)
        sizes = ", ".join(f"{height}" for height, _ in config.shapes)
        print(f"[{number}/{len(runs) + 1}] {name}: training at {sizes} px", flush=True)
        train(config)
        models[name] = load_pretrained(output / recipe / "last_ema")  # not "best": nothing is chosen on the test images
    print(f"[{len(runs) + 1}/{len(runs) + 1}] evaluating at {len(SIZES)} sizes", flush=True)
    return sweep(
        models,
        open_source("digits", "val"),
        SIZES,
        output / "report",
        batch_size=120,
        cost_seconds=0.1,
        command="anyres demo",
    )
