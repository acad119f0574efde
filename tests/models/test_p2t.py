from __future__ import annotations

import pytest
import torch

from anyres.models.p2t import P2T, PyramidPooling
from tests.contract.small import image, small
from tests.typed import as_a


def averaging_matrix(rows: int, side: int) -> torch.Tensor:
    """(rows, side): row a averages positions floor(a·side / rows) to ceil((a + 1)·side / rows)."""
    matrix = torch.zeros(rows, side)
    for a in range(rows):
        first, last = a * side // rows, -(-(a + 1) * side // rows)
        matrix[a, first:last] = 1 / (last - first)
    return matrix


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grid", [(56, 56), (10, 7), (1, 5)], ids=str)
def test_pooling_against_averaging_matrices(grid: tuple[int, int], training: bool) -> None:
    torch.manual_seed(0)
    pooling = PyramidPooling(6, (2, 3, 4))
    x = torch.randn(2, *grid, 6)
    levels = []
    convs = [as_a(torch.nn.Conv2d, conv) for conv in pooling]
    for ratio, conv in zip((2, 3, 4), convs, strict=True):
        rows, columns = (averaging_matrix(max(round(side / ratio), 1), side) for side in grid)
        level = torch.einsum("ah,bw,nhwc->ncab", rows, columns, x)
        level = level + torch.nn.functional.conv2d(level, conv.weight, conv.bias, padding=1, groups=6)
        levels.append(level.flatten(2).transpose(1, 2))
    with torch.set_grad_enabled(training):
        assert torch.allclose(pooling(x), torch.cat(levels, dim=1), atol=1e-6)


@pytest.mark.parametrize(("side", "keys"), [(160, (21, 34)), (224, (54, 73)), (288, (77, 110)), (320, (99, 138))])
def test_number_of_keys_at_published_sizes(side: int, keys: tuple[int, int]) -> None:
    """Halves are rounded to the even number: 3.5 to 4, 2.5 to 2."""
    stages = as_a(P2T, small("p2t_tiny")).stages
    for stage, stride, count in ((stages[0], 4, keys[0]), (stages[3], 32, keys[1])):
        pooling = as_a(PyramidPooling, stage.pooling)
        dim = as_a(torch.nn.Conv2d, pooling[0]).in_channels
        assert pooling(torch.zeros(1, side // stride, side // stride, dim)).shape == (1, count, dim)


def test_blocks_of_a_stage_share_their_pooling() -> None:
    model = small("p2t_tiny", depths=(1, 3, 1, 1)).train()
    model(image(1, (64, 64), model)).sum().backward()
    assert sum("pooling" in name for name, _ in model.named_parameters()) == 4 * 4 * 2
