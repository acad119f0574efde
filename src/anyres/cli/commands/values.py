"""Values that several commands accept."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from anyres.errors import UserError

Positive = Annotated[int, Field(ge=1)]
"""A number of at least 1."""


def present_device(name: str) -> str:
    """Return the name of a device that the machine has; "auto" is a GPU if there is one. Raises UserError.

    Asked by a command and not by the type of its option, because the answer takes an import of torch.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name!r}; it must be auto, cpu, cuda, cuda:1, mps, …") from None
    if device.type not in ("cpu", "cuda"):
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, ImportError):  # depends on the type of device
            raise UserError(f"device is {name!r}, but this machine does not have it: choose cpu.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices: choose cpu."
        )
    return name
