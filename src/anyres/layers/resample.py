"""Bicubic and bilinear resampling of tables as two small matrix products."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from anyres.layers.size_cache import cached_by_size


def sample_positions(target: int, source: int) -> Tensor:
    """Return the positions (target,) of the samples in source coordinates, in float64.

    Computed on the CPU, because not every accelerator supports float64.
    """
    return (torch.arange(target, dtype=torch.float64, device="cpu") + 0.5) * (source / target) - 0.5


@cached_by_size()
def bicubic_matrix(target: int, source: int, device: torch.device) -> Tensor:
    """Return the (target, source) matrix M of 1-D bicubic interpolation, y = M x.

    It equals `torch.nn.functional.interpolate(mode="bicubic", align_corners=False, antialias=False)` called with the
    target *size*: cubic convolution with a = -0.75 and repeated border samples. float32.
    """
    a = -0.75
    position = sample_positions(target, source)
    first = position.floor()
    fraction = position - first
    matrix = torch.zeros(target, source, dtype=torch.float64, device="cpu")
    for tap in (-1, 0, 1, 2):
        distance = (fraction - tap).abs()
        near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
        far = ((distance - 5) * distance + 8) * distance * a - 4 * a
        weight = torch.where(distance <= 1, near, far)
        index = (first.long() + tap).clamp(0, source - 1)
        matrix.scatter_add_(1, index[:, None], weight[:, None])
    return matrix.float().to(device)


@cached_by_size()
def bilinear_matrix(target: int, source: int, device: torch.device) -> Tensor:
    """Return the (target, source) matrix of 1-D linear interpolation, float32.

    It equals `interpolate(mode="bilinear", align_corners=False, antialias=False)`: half-pixel centres and repeated
    border samples.
    """
    distance = sample_positions(target, source).clamp(0, source - 1)[:, None] - torch.arange(source, device="cpu")
    return (1 - distance.abs()).clamp(min=0).float().to(device)


def resample_table(table: Tensor, size: tuple[int, int], mode: Literal["bicubic", "bilinear"] = "bicubic") -> Tensor:
    """Resize a table (..., h, w) to (..., *size) in float32, as in `bicubic_matrix` or `bilinear_matrix`.

    A table that already has this size is returned unchanged, so the native size costs nothing and is bit-identical.
    """
    h, w = table.shape[-2:]
    if (h, w) == size:
        return table
    matrix = bicubic_matrix if mode == "bicubic" else bilinear_matrix
    rows, columns = matrix(size[0], h, table.device), matrix(size[1], w, table.device)
    with torch.autocast(table.device.type, enabled=False):
        return rows @ table.float() @ columns.T
