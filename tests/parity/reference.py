"""Recorded numbers of the published models: how to rebuild the weights and inputs they were recorded with.

Every parameter has a value that depends only on its published name and shape, so a case needs no weights file. The
random stream is numpy's legacy `RandomState`, which numpy keeps frozen.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

CASES = Path(__file__).parent / "cases"


@dataclass(frozen=True)
class Case:
    """One recorded input of one published model."""

    manifest: Path
    tag: str

    @property
    def about(self) -> dict[str, Any]:
        return json.loads(self.manifest.read_text())

    @property
    def record(self) -> dict[str, Any]:
        return next(case for case in self.about["cases"] if case["tag"] == self.tag)

    def input(self) -> torch.Tensor:
        return image(self.record["input"], self.record["seed"])

    def weights(self) -> dict[str, torch.Tensor]:
        """A published-style state dict; tables that the published code computes itself are left out, as are second
        names."""
        return {
            name: torch.from_numpy(fill_value(name, tuple(shape)))
            for name, shape, role in self.about["state_dict"]
            if role in ("param", "stat")
        }

    def expected(self, output: str) -> np.ndarray:
        with np.load(self.manifest.with_suffix(".npz")) as arrays:
            return arrays[f"{self.tag}/{output}"]

    def error(self, output: str, ours: torch.Tensor) -> float:
        """Relative error ‖ours − expected‖ / ‖expected‖; the shape must agree first."""
        about = self.record["outputs"][output]
        assert list(ours.shape) == about["shape"], f"{output}: {tuple(ours.shape)}, recorded {about['shape']}"
        array = ours.detach().numpy()
        expected = self.expected(output)
        array = thin(array) if about["thinned"] else array
        return float(np.linalg.norm(array.ravel() - expected.ravel()) / np.linalg.norm(expected))


def cases() -> list[Case]:
    return [
        Case(manifest, case["tag"])
        for manifest in sorted(CASES.glob("*/*.json"))
        for case in json.loads(manifest.read_text())["cases"]
    ]


def fill_value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        return (0.5 + np.abs(noise)).astype(np.float32)
    if name.endswith("running_mean"):
        return 0.1 * noise
    vector = len(shape) == 1 or (len(shape) == 4 and shape[0] == shape[2] == shape[3] == 1)
    if name.endswith(".weight") and not vector:
        return (noise * int(np.prod(shape[1:])) ** -0.5).astype(np.float32)
    if not vector and len(shape) >= 2:  # position tables, class tokens, relative biases
        return 0.5 * noise
    if name.endswith(".weight"):  # scales of norms
        return 1.0 + 0.1 * noise
    if name.endswith(".bias"):
        return 0.1 * noise
    return (0.5 + 0.1 * noise).astype(np.float32)  # layer scales, temperatures


def image(shape: list[int], seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32))


def thin(array: np.ndarray, limit: int = 1024) -> np.ndarray:
    """Every k-th element in C order, at most `limit`."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat[:: max(1, -(-flat.size // limit))]
