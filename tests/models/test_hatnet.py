"""HAT-Net: padded windows against attention cut by hand, and pooling of what does not fill a cell."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from anyres.models.hatnet import HATNet, HierarchicalAttention, ImageNorm


@torch.no_grad()
def test_norm_sees_the_whole_map() -> None:
    norm = ImageNorm(6)
    norm.weight.normal_()
    norm.bias.normal_()
    x = torch.randn(2, 5, 3, 6) * 4 + 1
    mean, variance = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(norm(x), (x - mean) / (variance + 1e-6).sqrt() * norm.weight + norm.bias)


@pytest.mark.parametrize("grid", [(10, 7), (4, 8), (3, 2)], ids=str)
@torch.no_grad()
def test_padded_windows_equal_smaller_ones(grid: tuple[int, int]) -> None:
    """Every window by itself, as large as the map lets it be."""
    torch.manual_seed(0)
    attn = HierarchicalAttention(8, 4, window=4, pool=2, remainder="pad")
    x = torch.randn(2, *grid, 8)
    expected = torch.empty_like(x)
    for top in range(0, grid[0], 4):
        for left in range(0, grid[1], 4):
            window = (slice(None), slice(top, top + 4), slice(left, left + 4))
            q, k, v = attn.qkv(x[window]).flatten(1, 2).view(2, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
            out = F.softmax(q @ k.transpose(2, 3) / 2, dim=-1) @ v
            expected[window] = out.transpose(1, 2).reshape(x[window].shape)
    torch.testing.assert_close(attn.inside_windows(x), expected)


@torch.no_grad()
def test_last_cells_average_what_exists() -> None:
    """Pooling keeps the last column; truncated pooling does not see it."""
    torch.manual_seed(0)
    x = torch.randn(1, 4, 5, 8)
    outputs: list[torch.Tensor] = []
    for remainder in ("pad", "truncate"):
        torch.manual_seed(1)
        attn = HierarchicalAttention(8, 4, window=4, pool=2, remainder=remainder)
        z = attn.grid_norm(x + attn.inside_windows(attn.norm(x)))
        cells = [
            z[:, i : i + 2, j : j + 2].mean((1, 2)) for i in (0, 2) for j in ((0, 2, 4) if not outputs else (0, 2))
        ]
        pooled = torch.stack(cells, dim=1).view(1, 2, -1, 8)
        k, v = attn.kv(attn.ds_norm(pooled)).view(1, -1, 2, 2, 4).permute(2, 0, 3, 1, 4)
        q = attn.q(z).view(1, -1, 2, 4).transpose(1, 2)
        out = F.softmax(q @ k.transpose(2, 3) / 2, dim=-1) @ v
        expected = attn.proj(out.transpose(1, 2).reshape(x.shape) + z)
        torch.testing.assert_close(attn(x), expected)
        outputs.append(expected)
    padded, truncated = outputs
    assert not torch.allclose(padded, truncated)


def test_truncating_pools_need_a_whole_cell() -> None:
    assert HATNet(depths=(1, 1, 1, 1), remainder="truncate").minimum_size == 29
