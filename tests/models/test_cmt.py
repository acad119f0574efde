"""CMT: position biases at other grids, and keys at sizes that do not divide."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from anyres.models.cmt import CMT, position_bias
from tests.contract.small import small


def by_interpolation(
    table: torch.Tensor, native: tuple[int, int], reduction: int, keys: tuple[int, int]
) -> torch.Tensor:
    """The resized bias of a grid that the keys tile, with torch's own resizing: axes of the keys, then of the
    queries."""
    heads = table.shape[0]
    (kh, kw), (qh, qw) = native, (native[0] * reduction, native[1] * reduction)
    pictures = F.interpolate(table.view(heads, qh * qw, kh, kw), keys, mode="bicubic")
    pictures = pictures.view(heads, qh, qw, -1).permute(0, 3, 1, 2)
    return F.interpolate(pictures, (keys[0] * reduction, keys[1] * reduction), mode="bicubic").permute(0, 2, 3, 1)


@pytest.mark.parametrize("grid", [(8, 12), (7, 9), (20, 4), (1, 1)], ids=str)
@torch.no_grad()
def test_bias_is_resized_by_axes_and_cut_to_the_grid(grid: tuple[int, int]) -> None:
    table = torch.randn(2, 12 * 12, 9)
    keys = (-(-grid[0] // 4), -(-grid[1] // 4))
    expected = by_interpolation(table, (3, 3), 4, keys)[:, : grid[0], : grid[1]].flatten(1, 2)[None]
    torch.testing.assert_close(position_bias(table, (3, 3), 4, grid), expected)


@torch.no_grad()
def test_native_grid_gets_the_table_itself() -> None:
    table = torch.nn.Parameter(torch.randn(2, 12 * 20, 15))
    bias = position_bias(table, (3, 5), 4, (12, 20))
    assert torch.equal(bias[0], table)
    assert not bias.requires_grad  # fused kernels refuse a mask that does


@torch.inference_mode()
def test_every_row_and_column_counts() -> None:
    """The last pixel of any size reaches the keys; published arithmetic would drop it."""
    model = small("cmt_tiny")
    x = torch.randn(1, 3, 97, 66)
    changed = x.clone()
    changed[..., -1, -1] += 1
    assert not torch.equal(model(x), model(changed))
    assert model.feature_sizes(97, 66) == [(25, 17), (13, 9), (7, 5), (4, 3)]


def test_tables_of_another_size_are_resized() -> None:
    source, target = small("cmt_tiny", img_size=96), small("cmt_tiny", img_size=(64, 128))
    assert isinstance(target, CMT)
    resized = target.fit_tables(source.state_dict())
    assert sorted(resized) == [f"stages.{i}.relative_pos" for i in range(4)]
    assert all(resized[name].shape == target.state_dict()[name].shape for name in resized)
    assert not source.fit_tables(source.state_dict())
