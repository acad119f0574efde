"""What one forward pass costs: arithmetic, time and memory.

Conventions, the same for every model:

- **FLOPs = 2 × multiply-adds** (one multiplication and one addition each count). Papers on vision transformers often
  print multiply-adds ("MACs") under the name of FLOPs: DeiT-S at 224 is 9.20 GFLOP = 4.60 GMAC. Matrix products,
  convolutions and attention count; norms, activations, softmax and sums do not, as in the papers.
- **images/s** is batch size over the median time of a batch, **latency** the median time of one image alone, both
  after warm-up.
- **peak memory** is weights and buffers + input + the most activation memory alive at any moment of one batch, in
  10^6 bytes. On CUDA it is what the allocator handed out. On a CPU it is the sum of the live tensor storages after
  every operator, which is the same for every run (resident-set marks are not). Scratch space inside an operator is in
  the CUDA figure and not in the CPU one.
"""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from anyres.data.config import DataConfig
from anyres.inference.precision import precision_context

# Fused attention operators that some supported torch version counts as zero. Shapes are (batch, heads, tokens, width).
_ATTENTION_OPERATORS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)


@dataclass(frozen=True)
class Cost:
    """Cost of a forward pass; see the conventions of this module."""

    gflops: float  # per image, 10^9, 2 × multiply-adds
    params: int
    images_per_second: float
    latency_ms: float
    peak_memory_mb: float


def measure_cost(
    model: nn.Module,
    size: tuple[int, int],
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    seconds: float = 0.5,
) -> Cost:
    """Measure `model` on random images of `size` (height, width).

    `precision` is that of `evaluate`. Each timing repeats for about `seconds`, at least three times, after one
    warm-up run. The model is moved to `device` and is put back into its mode afterwards. Errors of the model (a size
    that it refuses) pass through.
    """
    device = torch.device(device)
    was_training = model.training
    model = model.to(device).eval()
    single = random_input(model, 1, size, device)
    batch = random_input(model, batch_size, size, device)
    try:
        gflops = count_flops(model, single) / 1e9
        latency = _median_seconds(model, single, precision, seconds)
        per_batch = latency if batch_size == 1 else _median_seconds(model, batch, precision, seconds)
        peak = peak_memory_bytes(model, batch, precision)
    finally:
        model.train(was_training)
    params = sum(parameter.numel() for parameter in model.parameters())
    return Cost(gflops, params, batch_size / per_batch, latency * 1e3, peak / 1e6)


def count_flops(model: nn.Module, images: Tensor) -> int:
    """FLOPs (2 × multiply-adds) of one forward pass over `images` (B, C, H, W), fused attention included."""
    with torch.no_grad(), _FlopCounter() as counter:
        model(images)
    return counter.total


class _FlopCounter(TorchDispatchMode):
    """Adds up what every operator costs. torch's own counter hooks all modules too, and a model that is watched may
    compute more than it does for its result alone."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        own = {getattr(torch.ops.aten, name, None): _attention_flops for name in _ATTENTION_OPERATORS}
        self.formulas = {**flop_registry, **own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if formula := self.formulas.get(func.overloadpacket):
            self.total += formula(*args, **kwargs or {}, out_val=out)
        return out


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two matrix products: (N, d) × (d, M) for the scores and (N, M) × (M, e) for the values, in each head."""
    *batch, tokens, width = query.shape
    return 2 * math.prod(batch) * tokens * key.shape[-2] * (width + value.shape[-1])


def peak_memory_bytes(model: nn.Module, images: Tensor, precision: str = "float32") -> int:
    """Weights and buffers + `images` + the most that one forward pass allocates on top of them at any moment.

    Run the model once before, so that what it remembers for a size is not taken for what every pass needs.
    """
    held = [tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers(), images]]
    resident = sum({storage._cdata: storage.nbytes() for storage in held}.values())
    with torch.no_grad():
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
            torch.cuda.reset_peak_memory_stats(images.device)
            before = torch.cuda.memory_allocated(images.device)
            with precision_context(precision, images.device):
                model(images)
            torch.cuda.synchronize(images.device)
            return int(resident + torch.cuda.max_memory_allocated(images.device) - before)
        with precision_context(precision, images.device), _LiveStorage(held) as live:
            model(images)
    return int(resident + live.peak)


class _LiveStorage(TorchDispatchMode):  # torch leaves it untyped
    """Sums the storages that operators make and that still live; `peak` is the largest sum seen, in bytes.

    Agrees with the events of torch's CPU allocator to the byte for transformers (views and in-place results share
    their storage).
    """

    def __init__(self, held: Sequence[torch.UntypedStorage]) -> None:
        super().__init__()
        self.peak = 0
        self._current = 0
        self._held = {storage._cdata for storage in held}
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._held or address in self._live:
            return
        size = storage.nbytes()
        self._live[address] = weakref.ref(storage, lambda _: self._forget(address, size))
        self._current += size
        self.peak = max(self.peak, self._current)

    def _forget(self, address: int, size: int) -> None:
        del self._live[address]
        self._current -= size


def random_input(
    model: nn.Module, batch_size: int, size: tuple[int, int], device: str | torch.device = "cpu"
) -> Tensor:
    """Standard normal images (B, C, height, width), or clips (B, C, T, height, width) of a video model's length."""
    frames = getattr(model, "num_frames", None)
    return torch.randn(
        batch_size, DataConfig.of(model).in_chans, *(() if frames is None else (frames,)), *size, device=device
    )


def _median_seconds(model: nn.Module, images: Tensor, precision: str, seconds: float) -> float:
    def timed() -> float:
        start = time.perf_counter()
        with precision_context(precision, images.device):  # anew for each batch, as in `evaluate`
            model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - start

    with torch.inference_mode():
        timed()
        times: list[float] = []
        while len(times) < 3 or (sum(times) < seconds and len(times) < 1000):
            times.append(timed())
    return statistics.median(times)
