"""The cost of a forward pass: FLOPs, time and memory.

The conventions are the same for every model:

- **FLOPs = 2 × multiply-adds** (a multiply-add counts as two operations). Papers on vision transformers often report
  multiply-adds ("MACs") as FLOPs: DeiT-S at 224 has 9.20 GFLOP = 4.60 GMAC. Matrix products, convolutions and
  attention are counted; norms, activations, softmax and sums are not, as in the papers.
- **images/s** is the batch size divided by the median time of a batch, and **latency** is the median time of a single
  image, both after warm-up.
- **peak memory** is weights and buffers + input + the peak activation memory of one batch, in 10^6 bytes. On CUDA it
  is the memory allocated by torch. On a CPU it is the sum of the live tensor storages after every operator, which is
  the same in every run (unlike the resident set size). Scratch memory inside an operator is included on CUDA, but not
  on a CPU.
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

# Fused attention operators that some supported torch versions count as zero. Shapes are (batch, heads, tokens, width).
_ATTENTION_OPERATORS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)


@dataclass(frozen=True)
class Cost:
    """The cost of a forward pass; see the conventions at the top of this module."""

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

    `precision` means the same as in `evaluate`. After one warm-up run, each timing is repeated for about `seconds` and
    at least three times. The model is moved to `device`, and its train/eval mode is restored afterwards. Exceptions of
    the model, for example for a size that it does not support, are passed on.
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
    """Return the FLOPs (2 × multiply-adds) of a forward pass on `images` (B, C, H, W), including fused attention."""
    with torch.no_grad(), _FlopCounter() as counter:
        model(images)
    return counter.total


class _FlopCounter(TorchDispatchMode):
    """Sums the FLOPs of all operators.

    torch's own counter also hooks every module, and models with hooks may compute more than their result requires.
    """

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
    """Return the FLOPs of attention, i.e. of (N, d) × (d, M) for scores and (N, M) × (M, e) for values in each head."""
    *batch, tokens, width = query.shape
    return 2 * math.prod(batch) * tokens * key.shape[-2] * (width + value.shape[-1])


def peak_memory_bytes(model: nn.Module, images: Tensor, precision: str = "float32") -> int:
    """Return the bytes of weights, buffers and `images` plus the peak of what a forward pass allocates on top of them.

    Run the model once before, so that tensors which it caches for a size are not counted.
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


class _LiveStorage(TorchDispatchMode):  # the base class is untyped in torch
    """Tracks the total size of live storages created by operators; `peak` is the largest total so far, in bytes.

    For transformers this agrees with the events of torch's CPU allocator to the byte (views and in-place results share
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
    """Return standard normal images (B, C, height, width), or for a video model clips (B, C, T, height, width)."""
    frames = getattr(model, "num_frames", None)
    return torch.randn(
        batch_size, DataConfig.of(model).in_chans, *(() if frames is None else (frames,)), *size, device=device
    )


def _median_seconds(model: nn.Module, images: Tensor, precision: str, seconds: float) -> float:
    def timed() -> float:
        start = time.perf_counter()
        with precision_context(precision, images.device):  # entered anew for each batch, as in `evaluate`
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
