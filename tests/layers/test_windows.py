from __future__ import annotations

import pytest
import torch

from anyres.layers.positions import relative_bias
from anyres.layers.windows import (
    gathered_partition,
    label_mask,
    merge,
    padded_grid,
    padding_mask,
    partition,
    shift_mask,
    shifted_bias,
    window_attention,
    window_labels,
)

GRIDS = [((8, 12), (4, 4)), ((7, 5), (4, 3)), ((3, 10), (4, 4)), ((1, 1), (7, 7))]


@pytest.mark.parametrize(("grid", "window"), GRIDS)
@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
def test_merge_undoes_partition(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> None:
    x = torch.randn(2, *grid, 6)
    cut = partition(x, window, shift)
    padded = padded_grid(grid, window)
    assert cut.shape == (2, padded[0] * padded[1], 6)
    assert torch.equal(merge(cut, grid, window, shift), x)


def test_windows_are_row_major() -> None:
    x = torch.arange(4 * 6.0).view(1, 4, 6, 1)
    assert partition(x, (2, 3))[0, 6:12, 0].tolist() == [3, 4, 5, 9, 10, 11]
    assert partition(x, (2, 3), (1, 1))[0, :6, 0].tolist() == [7, 8, 9, 13, 14, 15]


def test_padding_is_masked() -> None:
    x = torch.randn(1, 5, 5, 12)
    mask = padding_mask((5, 5), (3, 3), x.device)
    assert mask is not None
    out = merge(window_attention(partition(x, (3, 3)), 2, 9, mask[:, None]), (5, 5), (3, 3))
    corner = x[:, 3:, 3:].reshape(1, 4, 12)
    assert torch.allclose(out[:, 3:, 3:].reshape(1, 4, 4), window_attention(corner, 2, 4), atol=1e-6)
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
    canvas = torch.zeros(2, *padded_grid(grid, window), 6)
    canvas[:, : grid[0], : grid[1]] = x
    rolled = torch.roll(canvas, (-shift[0], -shift[1]), (1, 2))
    cut = [strip.split(window[1], 2) for strip in rolled.split(window[0], 1)]
    expected = torch.cat([window_BwwC.flatten(1, 2) for strip in cut for window_BwwC in strip], dim=1)
    ours = partition(x, window, shift)
    assert torch.equal(ours, expected)
    assert torch.equal(gathered_partition(x, window, shift), expected)
    assert merge(ours, grid, window, shift).is_contiguous()


@pytest.mark.parametrize(("grid", "window"), GRIDS)
@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
def test_labels_stand_for_the_masks(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> None:
    """Attention with the mask for symbols equals that with the masks for numbers, at every position of the map."""
    heads, tokens, device = 2, window[0] * window[1], torch.device("cpu")
    table = torch.randn(heads, 2 * window[0] - 1, 2 * window[1] - 1)
    qkv = partition(torch.randn(2, *grid, 12), window, shift)
    padded = padded_grid(grid, window)
    for mask_padding in (True, False):
        mask = shifted_bias(table, window, padded, shift, grid if mask_padding else None)
        expected = merge(window_attention(qkv, heads, tokens, mask), grid, window, shift)
        labels = window_labels(grid, window, shift, mask_padding, device)
        general = label_mask(labels, heads, tokens, relative_bias(table, window)[0])
        general = general.unflatten(0, (heads, -1)).transpose(0, 1)
        assert torch.equal(merge(window_attention(qkv, heads, tokens, general), grid, window, shift), expected)
