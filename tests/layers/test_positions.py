"""Position layers against independent computations."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch.nn import functional as F

from anyres.layers import positions
from anyres.layers.resample import bicubic_matrix, resample_table

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("source", "target"), [((14, 14), (6, 6)), ((14, 14), (24, 17)), ((5, 9), (31, 2)), ((1, 3), (4, 4))]
)
def test_resampling_is_torchs_bicubic(source: tuple[int, int], target: tuple[int, int]) -> None:
    table = torch.randn(2, 5, *source)
    expected = F.interpolate(table.double(), target, mode="bicubic", align_corners=False, antialias=False).float()
    torch.testing.assert_close(resample_table(table, target), expected, atol=2e-6, rtol=1e-5)


def test_rows_of_the_resampling_matrix_sum_to_one() -> None:
    torch.testing.assert_close(bicubic_matrix(31, 7, CPU).sum(1), torch.ones(31))


def test_native_table_is_returned_itself() -> None:
    table = positions.AbsoluteTable(8, (3, 4), 1)
    assert table((3, 4)) is table.table


def test_absolute_table_keeps_its_prefix_rows() -> None:
    table = positions.AbsoluteTable(8, (3, 4), 2)
    resized = table((5, 7))
    assert resized.shape == (1, 2 + 35, 8)
    assert torch.equal(resized[:, :2], table.table[:, :2])
    patches = table.table[:, 2:].reshape(1, 3, 4, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(patches.double(), (5, 7), mode="bicubic").float().permute(0, 2, 3, 1).reshape(1, 35, 8)
    torch.testing.assert_close(resized[:, 2:], expected, atol=2e-6, rtol=1e-5)


def test_sine_map_by_the_formula() -> None:
    h, w, dim = 3, 5, 16
    ours = positions.sine_map((h, w), dim, CPU)[0]
    half = dim // 2
    for channel in range(dim):
        m = channel % half
        frequency = 10000 ** (-2 * (m // 2) / half)
        function = math.sin if m % 2 == 0 else math.cos
        for i in range(h):
            for j in range(w):
                step, length = (i + 1, h) if channel < half else (j + 1, w)
                expected = function(2 * math.pi * step / (length + 1e-6) * frequency)
                assert abs(ours[channel, i, j].item() - expected) < 1e-5


def test_local_embedding_shares_its_filters_between_heads() -> None:
    layer = positions.LocalPositionEmbedding(4)
    assert not layer(torch.randn(1, 6, 12), (2, 3), 3).any()  # starts as nothing: a fresh block is plain attention
    torch.nn.init.normal_(layer.conv.weight)
    assert layer.conv.bias is not None
    torch.nn.init.normal_(layer.conv.bias)
    values = torch.randn(2, 6, 12)
    folded = values.reshape(2, 2, 3, 3, 4).permute(0, 3, 4, 1, 2).reshape(6, 4, 2, 3)  # (B·heads, head_dim, h, w)
    expected = layer.conv(folded).reshape(2, 3, 4, 6).permute(0, 3, 1, 2).reshape(2, 6, 12)
    torch.testing.assert_close(layer(values, (2, 3), 3), expected)


def test_relative_bias_looks_up_offsets() -> None:
    bias = positions.RelativeBiasTable(2, (3, 4))
    full = bias((3, 4), 1, torch.zeros(1))
    assert full.shape == (1, 2, 13, 13)
    assert not full[:, :, 0].any()
    assert not full[:, :, :, 0].any()
    for query in range(12):
        for key in range(12):
            rows, columns = query // 4 - key // 4, query % 4 - key % 4
            assert torch.equal(full[0, :, 1 + query, 1 + key], bias.table[:, rows + 2, columns + 3])


def test_continuous_bias_depends_on_the_offset_only() -> None:
    bias = positions.ContinuousBias(2, (4, 4))((3, 5), 0, torch.zeros(1))[0].detach()
    pairs: dict[tuple[int, int], torch.Tensor] = {}
    for query in range(15):
        for key in range(15):
            offset = (query // 5 - key // 5, query % 5 - key % 5)
            assert torch.equal(pairs.setdefault(offset, bias[:, query, key]), bias[:, query, key])
    assert (bias > 0).all()
    assert (bias < 16).all()


def test_rotation_keeps_lengths_and_depends_on_normalised_distance() -> None:
    rotary = positions.AxialRotary(8, 1).eval()
    q, k = torch.randn(8), torch.randn(8)

    def logits(grid: tuple[int, int]) -> torch.Tensor:
        tokens = 1 + grid[0] * grid[1]
        rotation = rotary(grid, q)
        queries = rotation.queries(q.expand(1, 1, tokens, 8))[0, 0]
        keys = rotation.keys(k.expand(1, 1, tokens, 8))[0, 0]
        torch.testing.assert_close(queries.norm(dim=-1), q.norm().expand(tokens))
        assert torch.equal(queries[0], q)  # the prefix is not turned
        return (queries[1:] @ keys[1:].T).reshape(*grid, *grid)

    small, large = logits((2, 2)), logits((4, 4))
    # Same displacement in units of the image: one cell of two is two cells of four.
    torch.testing.assert_close(small[0, 0, 1, 0], large[0, 0, 2, 0])
    torch.testing.assert_close(large[0, 0, 2, 0], large[1, 3, 3, 3])
    assert (small[0, 0, 1, 0] - large[0, 0, 1, 0]).abs() > 1e-3


def test_jitter_only_in_training() -> None:
    rotary = positions.AxialRotary(8, 1, jitter=(0.5, 2.0))
    like = torch.zeros(1)
    rotary.eval()
    assert torch.equal(rotary((3, 3), like).cos, rotary((3, 3), like).cos)
    rotary.train()
    torch.manual_seed(0)
    first, second = rotary((3, 3), like), rotary((3, 3), like)
    assert not torch.equal(first.cos, second.cos)
    slowest = positions.axial_angles((3, 3), 8, 1, 100.0, CPU)[1, 0]
    factors = [torch.atan2(r.sin[1, 0], r.cos[1, 0]) / slowest for r in (first, second)]
    assert len(set(factors)) == 2


@pytest.mark.parametrize("kind", ["fixed", "learnt", "clamped"])
def test_queries_are_scaled_by_the_logarithm_of_the_tokens(kind: Literal["fixed", "learnt", "clamped"]) -> None:
    scale = positions.LogScale(17, kind)
    if scale.exponent is not None:
        assert scale.exponent.item() == 1
        torch.nn.init.constant_(scale.exponent, 0.5)
    expected = {
        "fixed": lambda ratio: ratio,
        "learnt": lambda ratio: ratio**0.5,
        "clamped": lambda ratio: min(max(ratio, 1), math.log(4 * 17) / math.log(17)),
    }[kind]
    for tokens in (5, 17, 40, 400):
        factor = scale(torch.zeros(2, tokens, 8)).factor
        assert factor.item() == pytest.approx(expected(math.log(tokens) / math.log(17)))
        assert factor.shape == ()  # a scalar does not widen half-precision queries
    assert scale(torch.zeros(2, 1, 8)).factor.isfinite()


def test_the_cache_is_bounded_and_its_tables_can_be_trained_on() -> None:
    with torch.inference_mode():
        for side in range(1, 100):
            positions.relative_index((side % 7 + 1, side), CPU)
    assert len(positions.relative_index.cache) <= 64  # type: ignore[attr-defined]  # there for tests
    with torch.inference_mode():
        table = positions.sine_map((91, 3), 8, CPU)
    layer = positions.GlobalPositionEmbedding(8, 1)
    layer((91, 3), torch.zeros(1)).sum().backward()  # an inference tensor could not be saved for backward
    assert not table.is_inference()
    assert layer.conv.weight.grad is not None
