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


def between_patches(bias: torch.Tensor, grid: tuple[int, int], num_prefix: int) -> torch.Tensor:
    """(heads, h, w, h, w): query, key."""
    return bias[0, :, num_prefix:, num_prefix:].unflatten(2, grid).unflatten(1, grid)


def parabolic(num_heads: int, isotropic: bool = False) -> positions.ParabolicBias:
    torch.manual_seed(0)
    layer = positions.ParabolicBias(num_heads, 16, isotropic)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def folded(layer: positions.ParabolicBias, q: torch.Tensor, grid: tuple[int, int], num_prefix: int) -> torch.Tensor:
    """The bias that the further channels of queries and keys amount to: (B, heads, N, N)."""
    widening = layer(q, grid, num_prefix)
    return widening.of_queries @ widening.of_keys.mT / q.shape[-1] ** 0.5


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize(("grid", "num_prefix"), [((3, 5), 1), ((7, 7), 2), ((1, 4), 0)])
def test_folding_equals_the_sum_of_parabolas(isotropic: bool, grid: tuple[int, int], num_prefix: int) -> None:
    layer = parabolic(3, isotropic)
    tokens = num_prefix + grid[0] * grid[1]
    q = torch.randn(2, 3, tokens, 16)
    row, column = torch.arange(grid[0] * grid[1]) // grid[1], torch.arange(grid[0] * grid[1]) % grid[1]
    places = torch.stack((row, column), dim=-1) * 2 / (grid[0] * grid[1]) ** 0.5
    delta = places[None] - places[:, None]  # [query, key]: from query to key
    found = torch.einsum("bhnd,hdm->bhnm", q, layer.weight) + layer.bias[:, None]
    found = found[:, :, num_prefix:, None]
    if layer.directions is None:
        expected = -found.exp().log1p()[..., 0] * (delta**2).sum(-1)
    else:
        along = torch.einsum("hmi,nki->hnkm", layer.directions, delta)
        curvatures, slopes = found.exp().log1p()[..., :4], found[..., 4:]
        expected = (-curvatures * along**2 + slopes * along).sum(-1)
    bias = folded(layer, q, grid, num_prefix)
    torch.testing.assert_close(
        bias, F.pad(expected, (num_prefix, 0, num_prefix, 0)), atol=1e-6 * expected.abs().max().item(), rtol=1e-6
    )
    # The first few queries alone, as the last block computes them.
    few = q[:, :, : num_prefix + 1]
    torch.testing.assert_close(
        layer(few, grid, num_prefix).of_queries, layer(q, grid, num_prefix).of_queries[:, :, : num_prefix + 1]
    )


def test_the_isotropic_parabola_does_not_see_that_an_image_is_turned() -> None:
    q = torch.randn(1, 2, 1, 16).expand(-1, -1, 15, -1)  # every token has the same content
    for isotropic in (True, False):
        layer = parabolic(2, isotropic)
        upright = between_patches(folded(layer, q, (3, 5), 0), (3, 5), 0)
        turned = between_patches(folded(layer, q, (5, 3), 0), (5, 3), 0)
        back = turned.rot90(1, (1, 2)).rot90(1, (3, 4))
        assert torch.allclose(back, upright, atol=1e-4) is isotropic
        # A translation is seen by neither.
        torch.testing.assert_close(upright[:, :2, :4, :2, :4], upright[:, 1:, 1:, 1:, 1:], atol=1e-4, rtol=1e-4)


def test_parabolas_change_smoothly_with_the_size() -> None:
    """A displacement of half an image has the same bias whatever the number of patches."""
    layer = parabolic(2)
    biases = []
    for side in (2, 4, 16):
        q = torch.ones(1, 2, side * side, 16)
        biases.append(between_patches(folded(layer, q, (side, side), 0), (side, side), 0)[:, 0, 0, side // 2, 0])
    torch.testing.assert_close(biases[0], biases[1])
    torch.testing.assert_close(biases[0], biases[2])


def test_functional_bias_by_the_formula() -> None:
    layer = positions.FunctionalBias(2, (4, 6))
    torch.nn.init.constant_(layer.log_slope, -0.3)
    for grid in ((3, 5), (9, 6)):
        bias = layer(grid, 1, torch.zeros(1))
        assert not bias[:, :, 0].any()
        assert not bias[:, :, :, 0].any()
        pairs = between_patches(bias, grid, 1)

        def psi(x: float) -> float:
            return math.log1p(math.exp(-0.3) * x)

        for query, key in (((0, 0), (2, 3)), ((2, 4), (1, 0)), ((1, 1), (1, 1))):
            axes = []
            for i in range(2):
                offset = query[i] - key[i]
                axes.append(math.copysign(psi(abs(offset)) / psi(max((4, 6)[i], grid[i])), offset))
            expected = layer.fc2(layer.fc1(torch.tensor(axes)).relu())
            torch.testing.assert_close(pairs[:, query[0], query[1], key[0], key[1]], expected)


def test_heads_look_in_their_directions_and_less_at_what_is_far() -> None:
    for heads in (1, 2, 3, 6, 12):
        layer = positions.FieldsOfView(heads, block=0, depth=3)
        bias = layer((5, 7), 1, torch.zeros(1))
        assert not bias[:, :, 0].any()
        assert not bias[:, :, :, 0].any()
        seen = between_patches(bias, (5, 7), 1)
        for head in range(heads):
            from_centre = seen[head, 2, 3]
            assert from_centre[2, 3] == 0  # every patch sees itself
            visible = from_centre.isfinite()
            if head % 3 == 2:
                assert visible.all()
                continue
            down, right = positions.VIEWS[head - head // 3]
            assert visible.sum() < 35 / 2
            for row in range(5):
                for column in range(7):
                    y, x = row - 2, column - 3
                    ahead, aside = (y * down + x * right), abs(y * right - x * down)
                    assert visible[row, column] == (ahead >= aside)
                    if visible[row, column]:
                        assert from_centre[row, column].item() == pytest.approx(-1.5 * math.hypot(y, x))


def test_a_mirrored_image_is_seen_by_the_heads_of_the_opposite_directions() -> None:
    seen = between_patches(positions.FieldsOfView(12, 0, 3)((4, 6), 0, torch.zeros(1)), (4, 6), 0)
    directed = [head for head in range(12) if head % 3 != 2]
    mirrored = [directed[positions.VIEWS.index((down, -right))] for down, right in positions.VIEWS]
    assert torch.equal(seen[directed].flip((2, 4)), seen[mirrored])
    assert not torch.equal(seen.flip((2, 4)), seen)


def test_few_heads_look_everywhere_from_block_to_block() -> None:
    blocks = [positions.FieldsOfView(3, block, 4) for block in range(4)]
    assert [block.first for block in blocks] == [0, 2, 4, 6]
    ahead = [block((3, 3), 0, torch.zeros(1))[0, 0, 4].unflatten(0, (3, 3)) for block in blocks]
    rightmost, uppermost = ahead[0][1, 2], ahead[1][0, 1]
    assert rightmost.item() == -1.5
    assert uppermost.item() == pytest.approx(-1.5 + 1 / 3)
    assert ahead[1][1, 2].isinf()
    assert blocks[-1].slope == 0.5


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
