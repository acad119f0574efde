"""Timing of alternatives in turn, in one process: a machine that others use too then disturbs all sides alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch


def rounds(calls: dict[str, Callable[[], object]], device: torch.device, count: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(count + 1):
        for name, call in calls.items():
            taken = _seconds(call, device)
            if number:
                times[name].append(taken)
    return times


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def ratio(over: list[float], under: list[float]) -> float:
    """Median over the rounds of the ratio of two times of the same round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def machine(device: torch.device) -> str:
    """One line that says where figures were taken."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}"
