"""Times the plain models: against timm's DeiT, and a multi-resolution step against a single-size one.

    uv run python benchmarks/plain.py            # both tables; minutes on a CPU
    uv run python benchmarks/plain.py --device cuda --batch 256

Everything compared is run in turn in one process, several rounds; ratios are medians over the rounds, so a machine that
others use too disturbs both sides alike. FLOP/s are given as a share of a 2048³ matrix product timed too.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import nn
from torch.nn import functional as F

from anyres.evaluation.cost import count_flops
from anyres.registry import create_model

SIZES = (96, 224, 384)
MULTI = (224, 160, 128)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def rounds(calls: dict[str, Callable[[], object]], device: torch.device, count: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(count + 1):
        for name, call in calls.items():
            taken = seconds(call, device)
            if number:
                times[name].append(taken)
    return times


def ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def forward_table(device: torch.device, dtype: torch.dtype, batch: int, count: int) -> None:
    left = torch.randn(2048, 2048, device=device, dtype=dtype)
    print(f"\nforward, batch {batch}, {str(dtype).removeprefix('torch.')}")
    print(f"{'model':18}{'size':>6}{'ms':>10}{'GFLOP/img':>11}{'share of peak':>15}{'time / timm deit_small':>24}")
    for size in SIZES:
        models: dict[str, nn.Module] = {
            "timm deit_small": timm.create_model("deit_small_patch16_224", dynamic_img_size=True),
            "deit_small": create_model("deit_small"),
            "resformer_small": create_model("resformer_small"),
            "  with rlpe": create_model("resformer_small", position="rlpe"),
        }
        models = {name: model.eval().to(device, dtype) for name, model in models.items()}
        x = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
        calls = {name: lambda model=model, x=x: model(x) for name, model in models.items()}
        with torch.inference_mode():
            times = rounds({**calls, "peak": lambda: left @ left}, device, count)
        peak = 2 * 2048**3 / statistics.median(times.pop("peak"))
        for name, model in models.items():
            flops = count_flops(model, x[:1])
            middle = statistics.median(times[name])
            share = flops * batch / middle / peak
            against = ratio(times[name], times["timm deit_small"])
            print(f"{name:18}{size:6}{1000 * middle:10.1f}{flops / 1e9:11.2f}{share:15.0%}{against:24.2f}")


def step_table(device: torch.device, autocast: bool, batch: int, count: int) -> None:
    """One training step of resformer_small at three sizes over one at the largest: forward, backward, AdamW."""
    from anyres.training.losses import backward_replicas, soft_cross_entropy

    model = create_model("resformer_small", drop_path_rate=0.1).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    labels = F.one_hot(torch.randint(1000, (batch,), device=device), 1000).float()
    views = {size: torch.randn(batch, 3, size, size, device=device) for size in MULTI}

    def forward(view: torch.Tensor, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return model.forward_train(view, wanted)

    def step(sizes: tuple[int, ...]) -> None:
        backward_replicas(
            forward,
            [views[size] for size in sizes],
            [labels] * len(sizes),
            lambda out, target, _: soft_cross_entropy(out["logits"], target),
            kind="smooth-l1",
        )
        optimizer.step()
        optimizer.zero_grad()

    times = rounds({"multi": lambda: step(MULTI), "single": lambda: step(MULTI[:1])}, device, count)
    tokens = sum((size // 16) ** 2 + 1 for size in MULTI) / ((MULTI[0] // 16) ** 2 + 1)
    print(f"\ntraining step of resformer_small, batch {batch}{', bfloat16 autocast' if autocast else ''}")
    print(f"sizes (224, 160, 128): {statistics.median(times['multi']):.2f} s")
    print(f"size 224 alone:        {statistics.median(times['single']):.2f} s")
    print(f"ratio of the steps {ratio(times['multi'], times['single']):.2f}, of the tokens {tokens:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bfloat16", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}")
    dtype = torch.bfloat16 if options.bfloat16 else torch.float32
    forward_table(device, dtype, options.batch, options.rounds)
    step_table(device, options.bfloat16, options.batch, max(3, options.rounds // 2))


if __name__ == "__main__":
    main()
