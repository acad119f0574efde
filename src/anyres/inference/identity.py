"""What tells whether an earlier result was made by the same model."""

from __future__ import annotations

import zlib

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """Return a checksum that changes with any weight, and with the arguments that the network was built with."""
    parts = (model, getattr(model, "backbone", model))
    arguments = [getattr(part, name, None) for part in parts for name in ("model_args", "options")]
    checksum = zlib.crc32(repr(arguments).encode())
    for name, tensor in sorted(model.state_dict().items()):
        checksum = zlib.crc32(name.encode(), checksum)
        # Viewed as bytes, because numpy does not support bfloat16.
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        checksum = zlib.crc32(data, checksum)
    return f"{type(model).__name__}-{checksum:08x}"


def own_version() -> str:
    """Return the version of anyres."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("anyres")
    except PackageNotFoundError:
        return "(not installed)"
