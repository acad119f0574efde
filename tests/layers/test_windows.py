from __future__ import annotations

import pytest
import torch

from anyres.layers.windows import merge, padded_grid, padding_mask, partition, shift_mask, window_attention

GRIDS = [((8, 12), (4, 4)), ((7, 5), (4, 3)), ((3, 10), (4, 4)), ((1, 1), (7, 7))]


@pytest.mark.parametrize(("grid", "window"), GRIDS)
@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
def test_merge_undoes_partition(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> None:
    x = torch.randn(2, *grid, 6)
    cut = partition(x, window, shift)
    padded = padded_grid(grid, window)
    assert cut.shape == (2, padded[0] * padded[1] // (window[0] * window[1]), window[0] * window[1], 6)
    assert torch.equal(merge(cut, grid, window, shift), x)
    before = ((padded[0] - grid[0]) // 2, (padded[1] - grid[1]) // 2)
    assert torch.equal(merge(partition(x, window, before=before), grid, window, before=before), x)


def test_windows_are_row_major() -> None:
    x = torch.arange(4 * 6.0).view(1, 4, 6, 1)
    assert partition(x, (2, 3))[0, 1, :, 0].tolist() == [3, 4, 5, 9, 10, 11]
    assert partition(x, (2, 3), (1, 1))[0, 0, :, 0].tolist() == [7, 8, 9, 13, 14, 15]


def test_padding_is_masked() -> None:
    x = torch.randn(1, 5, 5, 12)
    mask = padding_mask((5, 5), (3, 3), x.device)
    assert mask is not None
    out = merge(window_attention(partition(x, (3, 3)), 2, mask[:, None]), (5, 5), (3, 3))
    corner = x[:, 3:, 3:].reshape(1, 1, 4, 12)
    assert torch.allclose(out[:, 3:, 3:].reshape(1, 1, 4, 4), window_attention(corner, 2), atol=1e-6)
    assert padding_mask((6, 6), (3, 3), x.device) is None


def test_shift_mask_separates_what_the_roll_joined() -> None:
    mask = shift_mask((4, 4), (2, 2), (1, 1), torch.device("cpu"))
    assert mask.shape == (4, 4, 4)
    assert mask[0].all()
    assert torch.equal(mask[3], torch.eye(4, dtype=torch.bool))
    assert mask[1].tolist() == [[True, False] * 2, [False, True] * 2] * 2


@pytest.mark.parametrize(("grid", "window"), GRIDS)
@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
def test_windows_are_cut_from_the_rolled_map(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> None:
    x = torch.randn(2, *grid, 6)
    (top, left), padded = (1, 0) if grid == (7, 5) else (0, 0), padded_grid(grid, window)
    canvas = torch.zeros(2, *padded, 6)
    canvas[:, top : top + grid[0], left : left + grid[1]] = x
    rolled = torch.roll(canvas, (-shift[0], -shift[1]), (1, 2))
    cut = [strip.split(window[1], 2) for strip in rolled.split(window[0], 1)]
    expected = torch.stack([window_BwwC.flatten(1, 2) for strip in cut for window_BwwC in strip], dim=1)
    ours = partition(x, window, shift, (top, left))
    assert torch.equal(ours, expected)
    assert merge(ours, grid, window, shift, (top, left)).is_contiguous()
