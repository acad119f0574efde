"""Autocast by the name of the precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def precision_context(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return an autocast context for "bfloat16" or "float16", and a null context for "float32"."""
    if precision == "float32":
        return nullcontext()
    if precision in ("bfloat16", "float16"):
        return torch.autocast(device.type, dtype=getattr(torch, precision))
    raise ValueError(f"precision '{precision}' is not known; use float32, bfloat16 or float16")
