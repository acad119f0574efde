"""Times the forward pass of models beside timm's model of the same name, or beside themselves with explicit attention.

    uv run python benchmarks/models.py                # every model, all sizes, both precisions: hours on a CPU
    uv run python benchmarks/models.py --selection    # one mid-sized model of each system
    uv run python benchmarks/models.py swin_tiny 'pvt_*' --sizes 224 --precisions float32
    uv run python benchmarks/models.py --device cuda --batch 128

Both sides run in turn in one process; the ratio is the median over the rounds. "x": timm's model of the same name.
"e": timm has none; the same network with softmax(q·kᵀ)·v written out. FLOP/s (2 × multiply-adds, fused attention
counted) are a share of a 2048³ matrix product timed in the same rounds. Peak memory is weights, input and the most
activations alive.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import timm
import torch
from timing import machine, ratio, rounds
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.evaluation.cost import count_flops, peak_memory_bytes, random_input
from anyres.models._registry import create_model, list_models

SELECTION = [
    "resformer_small", "deit_small", "uvit_small", "gpvit_l1", "dynamicvit_deit_small", "dynamicvit_lvvit_small",
    "swin_tiny", "swin_mlp_tiny_c24_256", "cswin_tiny", "msg_transformer_tiny", "pvt_small", "pvt_v2_b2",
    "pvt_v2_b2_li", "p2t_small", "twins_pcpvt_small", "twins_svt_small", "mvitv2_tiny", "cvt_13", "cmt_small",
    "mpvit_small", "shunted_small", "scalablevit_small", "regionvit_small", "hatnet_small", "dat_tiny", "dat_pp_tiny",
    "dynamicvit_swin_tiny", "dynamicvit_convnext_tiny",
]  # fmt: skip

# Name in timm, and the options with which it takes other sizes. Everything else has no namesake there.
TIMM: dict[str, tuple[str, str]] = {
    **{f"deit_{s}": (f"deit_{s}_patch16_224", "dynamic") for s in ("tiny", "small", "base")},
    **{f"deit_{s}_distilled": (f"deit_{s}_distilled_patch16_224", "dynamic") for s in ("tiny", "small", "base")},
    **{f"swin_{s}": (f"swin_{s}_patch4_window7_224", "img_size") for s in ("tiny", "small", "base", "large")},
    **{f"swin_{s}_384": (f"swin_{s}_patch4_window12_384", "img_size") for s in ("base", "large")},
    **{f"pvt_v2_{s}": (f"pvt_v2_{s}", "any") for s in ("b0", "b1", "b2", "b2_li", "b3", "b4", "b5")},
    **{f"twins_{f}_{s}": (f"twins_{f}_{s}", "any") for f in ("pcpvt", "svt") for s in ("small", "base", "large")},
    **{f"mvitv2_{s}": (f"mvitv2_{s}", "img_size") for s in ("tiny", "small", "base", "large")},
}


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, scale: float | None = None, **__: Any
) -> Tensor:
    """What `scaled_dot_product_attention` computes, with the score matrix in memory."""
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1) @ v


def rival(name: str, size: int) -> nn.Module | None:
    """timm's model of the same name for this size."""
    if name not in TIMM:
        return None
    theirs, how = TIMM[name]
    options: dict[str, Any] = {"dynamic": {"dynamic_img_size": True}, "img_size": {"img_size": size}, "any": {}}[how]
    return timm.create_model(theirs, **options)


def measure(name: str, size: int, dtype: torch.dtype, batch: int, count: int, device: torch.device) -> str:
    """One line of the table."""
    model = create_model(name).eval().to(device, dtype)
    x = random_input(model, batch, (size, size), device).to(dtype)
    other = rival(name, size)
    left = torch.randn(2048, 2048, device=device, dtype=dtype)
    beside: Callable[[], object]
    if other is not None:
        other = other.eval().to(device, dtype)
        beside = lambda: other(x)  # noqa: E731
    else:

        def beside() -> object:
            with patch.object(F, "scaled_dot_product_attention", explicit_attention):
                return model(x)

    with torch.inference_mode():
        times = rounds({"ours": lambda: model(x), "beside": beside, "peak": lambda: left @ left}, device, count)
    memory = peak_memory_bytes(model, x) / 1e6
    flops = count_flops(model, x[:1]) * batch
    peak = 2 * 2048**3 / min(times["peak"])
    middle = statistics.median(times["ours"])
    mark = "e" if other is None else "x"
    return (
        f"{name:26}{size:5}{str(dtype).removeprefix('torch.'):>10}"
        f"{1000 * middle / batch:9.1f}{flops / batch / 1e9:9.2f}"
        f"{flops / middle / peak:8.0%}{ratio(times['ours'], times['beside']):8.2f}{mark}{memory:9.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names or patterns; all by default")
    parser.add_argument("--selection", action="store_true", help="one model of each system")
    parser.add_argument("--sizes", default="96,224,384")
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    patterns = options.models or ["*"]
    names = SELECTION if options.selection else [n for p in patterns for n in list_models(p)]
    print(machine(device))
    print(f"\n{'model':26}{'size':>5}{'type':>10}{'ms/img':>9}{'GFLOP':>9}{'of peak':>8}{'ratio':>8} {'MB':>9}")
    for dtype in (getattr(torch, precision) for precision in options.precisions.split(",")):
        for name in names:
            for size in map(int, options.sizes.split(",")):
                with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                    print(measure(name, size, dtype, options.batch, options.rounds, device), flush=True)
                gc.collect()


if __name__ == "__main__":
    main()
