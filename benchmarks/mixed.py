"""Times predictions for images of mixed sizes: grouped by shape, one by one, and padded to the largest of them.

uv run python benchmarks/mixed.py                                  # resformer_small, native and original
uv run python benchmarks/mixed.py --model swin_tiny --device cuda --batch 64 --images 2048 --side 224
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timing import machine, ratio, rounds

from anyres.data import EvalBatch, Item
from anyres.data.samples import EvalSample, EvalTransform
from anyres.inference.predictor import Predictor
from anyres.models._registry import create_model

RATIOS = (1, 4 / 3, 3 / 2, 16 / 9)
"""Aspect ratios of cameras and screens; those above 1 occur in both orientations."""
AREAS = (0.5, 1, 2)
"""Areas relative to that of the usual input, which differ in original sizes only."""


def images(count: int, side: int, seed: int = 0) -> list[np.ndarray]:
    """Return images of these ratios and areas in random order."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ratio, area = rng.choice(RATIOS), side * side * rng.choice(AREAS)
        sides = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
        made.append(noise.integers(0, 256, (*rng.choice((sides, sides[::-1])), 3), dtype=np.uint8))
    return made


class Padded:
    """An eval transform whose samples are all padded at the right and bottom to the largest of them."""

    def __init__(self, transform: EvalTransform, items: Sequence[Item]) -> None:
        self.transform = transform
        shapes = [transform.prepare(item).pixels[0].shape for item in items]
        self.largest = tuple(map(max, zip(*shapes, strict=True)))

    def prepare(self, item: Item) -> EvalSample:
        sample = self.transform.prepare(item)
        canvas = np.zeros(self.largest, dtype=np.uint8)
        height, width = sample.pixels[0].shape[:2]
        canvas[:height, :width] = sample.pixels[0]
        return sample._replace(pixels=[canvas])

    def shape(self, sample: EvalSample) -> None:
        return None

    def collate(self, items: Sequence[Item], samples: Sequence[EvalSample]) -> EvalBatch:
        return self.transform.collate(items, samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resformer_small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, default=224, help="the usual input is a square of this side")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = torch.device(options.device)
    model = create_model(options.model).eval()
    model.pretrained_cfg["train_sizes"] = [options.side]
    items = [Item(str(number), pixels, None) for number, pixels in enumerate(images(options.images, options.side))]

    def predictor(size: str, batch_size: int) -> Predictor:
        return Predictor(model, size, device=device, batch_size=batch_size)

    print(machine(device))
    print(f"{options.model}, {options.images} images, area {options.side}², batch {options.batch}")
    print(f"{'size':10}{'grouped':>10}{'one by one':>12}{'padded':>10}   images/s;  grouped / padded, / one by one")
    for size in ("native", "original"):
        grouped, single, padded = predictor(size, options.batch), predictor(size, 1), predictor(size, options.batch)
        together: Any = Padded(padded.transform, items)
        padded.transform, padded.size = together, together.largest[:2]
        runs = {"grouped": grouped, "single": single, "padded": padded}
        times = rounds({name: lambda run=run: list(run.stream(items)) for name, run in runs.items()}, device,
                       options.rounds)  # fmt: skip
        speeds = {name: options.images / statistics.median(taken) for name, taken in times.items()}
        print(f"{size:10}{speeds['grouped']:10.1f}{speeds['single']:12.1f}{speeds['padded']:10.1f}", end="   ")
        print(f"{ratio(times['padded'], times['grouped']):.2f}, {ratio(times['single'], times['grouped']):.2f}")


if __name__ == "__main__":
    main()
