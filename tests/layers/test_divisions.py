"""Windows that are a fraction of the grid: against attention over all tokens with a mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from anyres.layers.divisions import divide, divided_attention


@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("division", [2, 3, 4])
@pytest.mark.parametrize("grid", [(8, 12), (7, 5), (1, 3), (5, 8)])
def test_windows_equal_masked_attention(grid: tuple[int, int], division: int, num_prefix: int) -> None:
    torch.manual_seed(0)
    h, w = grid
    N = num_prefix + h * w
    q, k, v = torch.randn(3, 2, 3, N, 4)
    rows = torch.arange(h).repeat_interleave(w) // -(-h // division)
    columns = torch.arange(w).repeat(h) // -(-w // division)
    allowed = torch.ones(N, N, dtype=torch.bool)
    allowed[num_prefix:, num_prefix:] = (rows[:, None] == rows) & (columns[:, None] == columns)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    windows = divide(grid, division, num_prefix, q.device)
    assert sum(count * length for count, length in windows.groups) == h * w
    q, k, v = (x[:, :, windows.order] for x in (q, k, v))
    ours = divided_attention(q, k, v, windows, num_prefix)[:, :, windows.inverse]
    torch.testing.assert_close(ours, expected)
