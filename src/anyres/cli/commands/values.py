"""Values that several commands take, read and checked."""

from __future__ import annotations

from typing import Any

from anyres.errors import UserError


def read_numbers(name: str, text: str) -> list[float]:
    import math

    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"{name} is {text!r}; write numbers with commas between them, such as 0.5,1,1.5.")
    return numbers


def check_batch_size(number: int) -> None:
    if number < 1:
        raise UserError(f"batch_size is {number}; it must be at least 1.")


def check_device(name: str) -> str:
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
        except (RuntimeError, AssertionError, ImportError):  # each kind of device has its own way to say so
            raise UserError(f"device is {name!r}, but this machine does not offer it: choose cpu.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {name!r}, but this machine offers {torch.cuda.device_count()} CUDA devices: choose cpu."
        )
    return name


def read_mapping(name: str, text: str) -> dict[str, Any]:
    """`embed_dim=96,depth=4` or a YAML mapping → a dictionary."""
    import re

    from anyres.io.parsing import parse_yaml

    pair = r"(^|,)\s*(\w+)\s*="
    mapping = re.sub(pair, r"\1 \2: ", text)
    found = parse_yaml(f"{{{mapping}}}" if re.match(pair, text) else text, name)
    if not isinstance(found, dict):
        raise UserError(f"{name} is {text!r:.80}; write it as embed_dim=96,depth=4.")
    return found
