"""Bicubic and bilinear resampling of tables as two small matrix products."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from anyres.layers.size_cache import cached_by_size
from anyres.layers.sizes import regroup, same


def sample_positions(target: int, source: int) -> tuple[Tensor, Tensor]:
    """Return the whole and the fractional part (target,) of the samples' positions in source coordinates.

    Position i is (i + 0.5) * source / target - 0.5. It is divided as integers, so that the parts are exact also where
    floating-point numbers have 24 bits. The whole part is int64, at least -1; the fraction is float64, on the CPU
    because not every accelerator supports it.
    """
    unit = 2 * target
    position = (2 * torch.arange(target, device="cpu") + 1) * source + target  # in units, plus one whole
    whole = position // unit
    return whole - 1, (position - whole * unit).double() / unit


@cached_by_size()
def bicubic_matrix(target: int, source: int, device: torch.device) -> Tensor:
    """Return the (target, source) matrix M of 1-D bicubic interpolation, y = M x.

    It equals `torch.nn.functional.interpolate(mode="bicubic", align_corners=False, antialias=False)` called with the
    target *size*: cubic convolution with a = -0.75 and repeated border samples. float32.
    """
    a = -0.75
    first, fraction = sample_positions(target, source)
    column = torch.arange(source, device="cpu")
    matrix = torch.zeros(target, source, dtype=torch.float64, device="cpu")
    for tap in (-1, 0, 1, 2):
        distance = (fraction - tap).abs()
        near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
        far = ((distance - 5) * distance + 8) * distance * a - 4 * a
        weight = torch.where(distance <= 1, near, far)
        index = (first + tap).clamp(0, source - 1)
        matrix = matrix + torch.where(index[:, None] == column, weight[:, None], 0.0)
    return matrix.float().to(device)


@cached_by_size()
def bilinear_matrix(target: int, source: int, device: torch.device) -> Tensor:
    """Return the (target, source) matrix of 1-D linear interpolation, float32.

    It equals `interpolate(mode="bilinear", align_corners=False, antialias=False)`: half-pixel centres and repeated
    border samples.
    """
    whole, fraction = sample_positions(target, source)
    position = (whole + fraction).clamp(0, source - 1)
    distance = position[:, None] - torch.arange(source, device="cpu")
    return (1 - distance.abs()).clamp(min=0).float().to(device)


@cached_by_size()
def average_matrix(target: int, source: int, device: torch.device) -> Tensor:
    """Return the (target, source) matrix of 1-D adaptive average pooling, float32.

    Cell i is the mean of the samples from floor(i * source / target) to ceil((i + 1) * source / target).
    """
    cell = torch.arange(target, device=device)[:, None]
    first, end = cell * source // target, ((cell + 1) * source + target - 1) // target
    sample = torch.arange(source, device=device)
    return ((sample >= first) & (sample < end)).float() / (end - first)


def average_map(x_BHWC: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool a map to (B, *size, C), as `adaptive_avg_pool2d` does.

    Two matrix products are the general form, for sizes that are symbols; they round differently.
    """
    if not torch.compiler.is_exporting():
        return F.adaptive_avg_pool2d(x_BHWC.movedim(-1, 1), size).movedim(1, -1).contiguous()
    (B, H, W, C), (h, w) = x_BHWC.shape, size
    rows, columns = (
        average_matrix(target, source, x_BHWC.device).to(x_BHWC.dtype).expand(count, -1, -1)
        for count, target, source in ((B, h, H), (B * h, w, W))
    )
    lines = torch.bmm(rows, regroup(x_BHWC, B, H, W * C))
    return regroup(torch.bmm(columns, regroup(lines, B * h, W, C)), B, h, w, C)


def resample_table(table: Tensor, size: tuple[int, int], mode: Literal["bicubic", "bilinear"] = "bicubic") -> Tensor:
    """Resize a table (..., h, w) to (..., *size) in float32, as in `bicubic_matrix` or `bilinear_matrix`.

    A table that already has this size is returned unchanged, so the native size costs nothing and is bit-identical.
    """
    h, w = table.shape[-2:]
    if same((h, w), size):
        return table
    matrix = bicubic_matrix if mode == "bicubic" else bilinear_matrix
    rows, columns = matrix(size[0], h, table.device), matrix(size[1], w, table.device)
    with torch.autocast(table.device.type, enabled=False):
        if not torch.compiler.is_compiling():
            return rows @ table.float() @ columns.T
        # Batched, because `@` chooses by the sizes whether to merge axes.
        maps = table.float().flatten(0, -3)
        rows, columns = (matrix.expand(maps.shape[0], -1, -1) for matrix in (rows, columns))
        return torch.bmm(torch.bmm(rows, maps), columns.mT).unflatten(0, table.shape[:-2])
