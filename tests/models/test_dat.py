"""DAT's fast paths against the definitions, and its tables at other native sizes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from anyres.models._registry import create_model
from anyres.models.dat import (
    DAT,
    ClampedDeformableAttention,
    DeformableAttention,
    LocalAttention,
    NeighbourhoodAttention,
)
from tests.systems import system
from tests.typed import as_a


def neighbourhood(module: NeighbourhoodAttention, x: torch.Tensor) -> torch.Tensor:
    """Neighbourhood attention of one image (H, W, C), query by query."""
    H, W, C = x.shape
    heads = module.num_heads
    x = F.pad(x, (0, 0, 0, max(7 - W, 0), 0, max(7 - H, 0)))
    q, k, v = module.qkv(x).unflatten(2, (3, heads, -1)).unbind(2)
    out = torch.empty(H, W, C)
    for i in range(H):
        for j in range(W):
            top, left = (min(max(at - 3, 0), side - 7) for at, side in ((i, x.shape[0]), (j, x.shape[1])))
            rows, columns = slice(top, top + 7), slice(left, left + 7)
            bias = module.rpb[:, top - i + 6 : top - i + 13, left - j + 6 : left - j + 13]
            logits = torch.einsum("hd,rchd->hrc", q[i, j], k[rows, columns]) * (C // heads) ** -0.5 + bias
            weights = logits.flatten(1).softmax(1).view_as(logits)
            out[i, j] = torch.einsum("hrc,rchd->hd", weights, v[rows, columns]).flatten()
    return module.proj(out)


@pytest.mark.parametrize("grid", [(17, 15), (7, 23), (14, 8), (5, 16), (1, 2)], ids=str)
def test_tiles_are_neighbourhoods(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = NeighbourhoodAttention(8, 2)
    torch.nn.init.normal_(module.rpb)
    x = torch.randn(2, *grid, 8)
    expected = torch.stack([neighbourhood(module, one) for one in x])
    assert torch.allclose(module(x), expected, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(module(x), expected, atol=1e-6)
    parameters = list(module.parameters())
    ours = torch.autograd.grad(module(x).square().sum(), parameters)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("kind", [DeformableAttention, ClampedDeformableAttention])
def test_bias_is_separable_and_shared_by_the_heads_of_a_group(kind: type[DeformableAttention]) -> None:
    """bias(point) = A_y · table · A_xᵀ with hat functions as weights, at a size that is not the native one."""
    torch.manual_seed(0)
    module = kind(16, 4, 2, 3, 1, (5, 6)).double()
    torch.nn.init.normal_(module.rpe_table)
    points = module.points(torch.randn(2, 2, 4, 3, 2, dtype=torch.float64))
    bias = module.bias((4, 3), points)

    def weights(queries: torch.Tensor, point: torch.Tensor, size: int) -> torch.Tensor:
        row = ((queries - point) / 2 + 1) * (size - 1) / 2
        return (1 - (row[:, None] - torch.arange(size)).abs()).clamp(min=0)

    for image in range(2):
        for head in range(4):
            for m, (y, x) in enumerate(points[image, head // 2]):
                rows = weights(module.queries(4, points), y, 9)
                columns = weights(module.queries(3, points), x, 11)
                expected = (rows @ module.rpe_table[head] @ columns.T).flatten()
                assert torch.allclose(bias[image, head, :, m], expected)


@pytest.mark.parametrize("shifted", [False, True])
def test_padding_is_no_key(shifted: bool) -> None:
    """What stands in the padding changes nothing: windows of 3 on a map of 5, shifted by 2."""
    torch.manual_seed(0)
    module = LocalAttention(8, 2, 3, shifted)
    x = torch.randn(1, 5, 5, 8)
    out = module(x)
    real = F.pad(torch.ones(1, 5, 5, 1), (0, 0, 0, 1, 0, 1))
    padded = F.pad(x, (0, 0, 0, 1, 0, 1))
    q, k, v = module.qkv(padded).unflatten(3, (3, 2, 4)).unbind(3)
    shift = 2 if shifted else 0
    for i, j in ((0, 0), (2, 4), (4, 4), (4, 1)):

        def alike(at: int) -> list[int]:
            """Rows of the padded map that a row shares its window with, in the map as it stands."""
            return [other for other in range(6) if (other - shift) // 3 == (at - shift) // 3]

        keys = [(r, c) for r in alike(i) for c in alike(j) if real[0, r, c, 0]]
        logits = torch.stack(
            [(q[0, i, j] * k[0, r, c]).sum(1) / 2 + module.bias_table[:, i - r + 2, j - c + 2] for r, c in keys]
        )
        values = torch.stack([v[0, r, c] for r, c in keys])
        expected = module.proj((logits.softmax(0)[..., None] * values).sum(0).flatten())
        assert torch.allclose(out[0, i, j], expected, atol=1e-6)


def test_tables_of_another_native_size_are_resized() -> None:
    args = system("dat_tiny").SMALL["dat_*"]
    small = create_model("dat_tiny", **args)
    large = as_a(DAT, create_model("dat_tiny", **args, img_size=96, window_size=4))
    resized = large.fit_tables(small.state_dict())
    assert {name.rpartition(".")[2] for name in resized} == {"bias_table", "rpe_table"}
    assert all(table.shape == large.state_dict()[name].shape for name, table in resized.items())
    table = small.state_dict()["stages.2.blocks.1.attn.rpe_table"]
    expected = F.interpolate(table[None], (11, 11), mode="bicubic", align_corners=False)[0]
    assert torch.allclose(resized["stages.2.blocks.1.attn.rpe_table"], expected, atol=1e-6)
