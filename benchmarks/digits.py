"""Multi-resolution against single-size training of a tiny network of each system, on the built-in digits.

    uv run python benchmarks/digits.py --output runs/table              # all systems: about an hour on 2 cores
    uv run python benchmarks/digits.py pvt swin --seeds 0,1

Both runs see as many image views in as many steps of as many images; everything else is the recipe `digits` with milder
crops. ResFormer and DeiT are in the demo.
Multi-resolution: 64, 48 and 40 px in every step with the scale-consistency loss. Single size: 64 px. Accuracy is of
the averaged last weights on the 360 held-out images. Runs that are finished are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

MULTI = (64, 48, 40)
TEST = (64, 56, 48, 44, 40, 36, 32)

_WIDTHS = {"embed_dims": (32, 48, 64, 96), "depths": (1, 1, 2, 1)}
_HEADS = {"num_heads": (1, 2, 2, 3)}
_MLP = {"mlp_ratios": (2, 2, 2, 2)}
_DOUBLING = {"embed_dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
_PLAIN = {"embed_dim": 48, "depth": 4, "num_heads": 3, "mlp_ratio": 2, "patch_size": 8, "img_size": 64}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "uvit": ("uvit_tiny", _PLAIN),
    "gpvit": ("gpvit_l1", {"embed_dim": 48, "depth": 4, "group_tokens": (16,), "img_size": 64}),
    "dynamicvit (DeiT)": ("dynamicvit_deit_small", {**_PLAIN, "prune_before": (1, 2, 3)}),
    "dynamicvit (ConvNeXt)": ("dynamicvit_convnext_tiny", {"embed_dims": (32, 48, 64, 96), "depths": (1, 1, 4, 1)}),
    "dynamicvit (Swin)": (
        "dynamicvit_swin_tiny",
        {"embed_dim": 16, "depths": (1, 1, 4, 1), "num_heads": (1, 2, 4, 8)},
    ),
    "swin": ("swin_tiny", {"embed_dim": 16, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 4, 8)}),
    "swin_mlp": ("swin_mlp_base", {"embed_dim": 16, "depths": (2, 2, 2, 1), "num_heads": (2, 4, 8, 16)}),
    "cswin": ("cswin_tiny", {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (2, 4, 8, 16)}),
    "msg_transformer": (
        "msg_transformer_tiny",
        {"embed_dim": 16, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 4, 8)},
    ),
    "pvt": ("pvt_tiny", {**_WIDTHS, **_HEADS, **_MLP, "img_size": 64}),
    "pvt_v2": ("pvt_v2_b1", {**_WIDTHS, **_HEADS, **_MLP}),
    "p2t": ("p2t_tiny", {**_WIDTHS, **_HEADS, **_MLP}),
    "twins_pcpvt": ("twins_pcpvt_small", {**_WIDTHS, **_HEADS, **_MLP}),
    "twins_svt": ("twins_svt_small", {**_WIDTHS, "depths": (2, 2, 2, 2), **_HEADS, **_MLP}),
    "mvitv2": ("mvitv2_tiny", {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": 1, "img_size": 64}),
    "cvt": ("cvt_13", {"embed_dims": (32, 48, 96), "depths": (1, 1, 2), "num_heads": (1, 2, 3), "mlp_ratio": 2}),
    "cmt": (
        "cmt_tiny",
        {**_WIDTHS, **_HEADS, "stem_dim": 16, "head_dim": 128, "mlp_ratio": 2, "img_size": 64},
    ),
    "mpvit": ("mpvit_tiny", {**_WIDTHS, "paths": (2, 2, 2, 2)}),
    "shunted": ("shunted_tiny", {"embed_dims": (64, 64, 64, 96), "depths": (1, 1, 2, 1), "num_heads": (2, 2, 2, 3),
                                 **_MLP}),
    "scalablevit": ("scalablevit_small", {**_DOUBLING, "depths": (2, 2, 2, 2), **_MLP, "plain_head": True}),
    "regionvit": ("regionvit_tiny", {**_DOUBLING}),
    "hatnet": ("hatnet_tiny", {"embed_dims": (16, 32, 64, 96), "depths": (1, 1, 2, 1), "head_dim": 16, **_MLP}),
    "dat": ("dat_tiny", {"embed_dims": (16, 32, 64, 128), "blocks": ("L", "LS", "LD", "D"), "num_heads": (1, 2, 4, 8),
                         "groups": (1, 1, 2, 4), "img_size": 64}),
    "dat_pp": ("dat_pp_tiny", {"embed_dims": (16, 32, 64, 128), "blocks": ("N", "ND", "ND", "D"),
                               "num_heads": (1, 2, 4, 8), "groups": (1, 1, 2, 4), "img_size": 64}),
}  # fmt: skip
"""System → model and what makes it tiny."""

SLOW = {
    "uvit": 3,
    "dynamicvit (DeiT)": 3,
    "dynamicvit (ConvNeXt)": 3,
    "dynamicvit (Swin)": 3,
    "swin": 3,
    "swin_mlp": 3,
    "regionvit": 3,
}
"""Networks that need more passes over so few images, and how many times as many."""


def run(system: str, multi: bool, seed: int, epochs: int, output: Path) -> dict[str, Any]:
    """Train and evaluate one network on one thread."""
    import torch

    from anyres.data import open_source
    from anyres.evaluation import evaluate
    from anyres.tasks import load_pretrained
    from anyres.training import load_config, train

    torch.set_num_threads(1)
    folder = output / f"{system}-{'multi' if multi else 'single'}-{seed}"
    record = folder / "table.json"
    if record.is_file():
        return dict(json.loads(record.read_text()))
    model, args = TINY[system]
    epochs *= SLOW.get(system, 1)
    views = len(MULTI)
    options: dict[str, Any] = {
        "model": model,
        "model_args": args,
        "sizes": list(MULTI) if multi else [MULTI[0]],
        "distillation": "smooth-l1" if multi else "none",
        "crop_scale": [0.5, 1.6],
        "epochs": epochs if multi else epochs * views,
        "warmup_epochs": 1 if multi else views,
        "batch_size": 16 if multi else 16 * views,
        "lr": 2e-3,
        "output": str(folder),
        "seed": seed,
        "progress": False,
    }
    finished = train(load_config("digits", **options))
    assert finished.status == "finished", finished.status
    network, source = load_pretrained(folder / "last_ema"), open_source("digits", "val")
    top1 = {size: evaluate(network, source, (size, size), batch_size=120).scores["top1"] for size in TEST}
    result = {"system": system, "model": model, "multi": multi, "seed": seed, "top1": top1}
    record.write_text(json.dumps(result))
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, one line per system and seed: multi-resolution / single size at each test size."""
    by = {(r["system"], r["seed"], r["multi"]): {int(k): v for k, v in r["top1"].items()} for r in results}
    lines = [
        "| system | seed | " + " | ".join(f"{size}{' (both)' if size == MULTI[0] else ''}" for size in TEST) + " |",
        "|---|--:|" + "--:|" * len(TEST),
    ]
    for system, seed in dict.fromkeys((r["system"], r["seed"]) for r in results):
        multi, single = by.get((system, seed, True)), by.get((system, seed, False))
        if multi and single:
            cells = " | ".join(f"{multi[size]:.1f} / {single[size]:.1f}" for size in TEST)
            lines.append(f"| {system} | {seed} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", help="all by default")
    parser.add_argument("--output", type=Path, default=Path("runs/table"))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    jobs = [
        (system, multi, seed, options.epochs, options.output)
        for seed in map(int, options.seeds.split(","))
        for system in options.systems or TINY
        for multi in (True, False)
    ]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        results = list(pool.map(run, *zip(*jobs, strict=True)))
    print(table(results))


if __name__ == "__main__":
    main()
