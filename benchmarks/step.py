"""Times a multi-resolution training step against a single-size one: forward, backward, AdamW.

uv run python benchmarks/step.py                                  # resformer_small, sizes 224, 160, 128
uv run python benchmarks/step.py --model swin_tiny --device cuda --batch 128 --bfloat16
"""

from __future__ import annotations

import argparse
import statistics

import torch
from timing import machine, ratio, rounds
from torch.nn import functional as F

from anyres.models._registry import create_model
from anyres.training.losses import backward_replicas, soft_cross_entropy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resformer_small")
    parser.add_argument("--sizes", default="224,160,128", help="the first is the single size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bfloat16", action="store_true", help="under autocast")
    options = parser.parse_args()
    device = torch.device(options.device)
    sizes = tuple(map(int, options.sizes.split(",")))

    model = create_model(options.model, drop_path_rate=0.1).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    labels = F.one_hot(torch.randint(1000, (options.batch,), device=device), 1000).float()
    views = {size: torch.randn(options.batch, 3, size, size, device=device) for size in sizes}

    def forward(view: torch.Tensor, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bfloat16):
            return model.forward_train(view, wanted)

    def step(chosen: tuple[int, ...]) -> None:
        backward_replicas(
            forward,
            [views[size] for size in chosen],
            [labels] * len(chosen),
            lambda out, target, _: soft_cross_entropy(out["logits"], target),
            kind="smooth-l1",
        )
        optimizer.step()
        optimizer.zero_grad()

    times = rounds({"multi": lambda: step(sizes), "single": lambda: step(sizes[:1])}, device, options.rounds)
    print(machine(device))
    print(f"training step of {options.model}, batch {options.batch}{', bfloat16' if options.bfloat16 else ''}")
    print(f"sizes {sizes}: {statistics.median(times['multi']):.2f} s")
    print(f"size {sizes[0]} alone: {statistics.median(times['single']):.2f} s")
    print(f"ratio of the steps {ratio(times['multi'], times['single']):.2f}", end=", ")
    print(f"of the pixels {sum(side * side for side in sizes) / sizes[0] ** 2:.2f}")


if __name__ == "__main__":
    main()
