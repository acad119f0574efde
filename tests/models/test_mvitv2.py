"""MViTv2: both ways of adding the bias against the written-out equation, the float32 offsets, windows, clips."""

from __future__ import annotations

import math

import pytest
import torch

from anyres.models._registry import create_model
from anyres.models.mvitv2 import (
    MViTv2,
    bias_mask,
    biased_attention,
    offset_index,
    offset_products,
    offset_vectors,
)
from tests.contract.small import small
from tests.typed import as_a


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("grid", "key_grid"), [((5, 7), (3, 4)), ((4, 3), (7, 6)), ((2, 5, 3), (2, 3, 2))], ids=str)
@pytest.mark.parametrize("gradients", [True, False])
def test_both_forms_of_the_bias_are_the_equation(
    prefix: int, grid: tuple[int, ...], key_grid: tuple[int, ...], gradients: bool
) -> None:
    B, heads, dim = 2, 3, 8
    tokens, keys = (prefix + math.prod(sides) for sides in (grid, key_grid))
    q = torch.randn(B, tokens, heads, dim, requires_grad=gradients)
    k, v = torch.randn(2, B, keys, heads, dim)
    tables = [torch.randn(9, dim) for _ in grid]
    bias = torch.zeros(B, heads, tokens, keys)
    for axis, table in enumerate(tables):
        vectors = offset_vectors(table, grid[axis], key_grid[axis])
        rows = torch.cartesian_prod(*map(torch.arange, grid))[:, axis]
        columns = torch.cartesian_prod(*map(torch.arange, key_grid))[:, axis]
        bias[:, :, prefix:, prefix:] += torch.einsum("bnhd,nmd->bhnm", q[:, prefix:], vectors[rows][:, columns])
    logits = torch.einsum("bnhd,bmhd->bhnm", q * dim**-0.5, k) + bias
    expected = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v)
    ours = biased_attention(q, k, v, tables, grid, key_grid, prefix)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    mask = bias_mask(offset_products(q[:, prefix:], tables, grid, key_grid))
    torch.testing.assert_close(mask, bias[:, :, prefix:, prefix:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("queries", "keys", "lower"), [(39, 10, 38), (78, 10, 103), (56, 14, 0), (7, 14, 0)])
def test_offsets_are_rounded_as_float32_rounds_them(queries: int, keys: int, lower: int) -> None:
    """Entries that lie one row below the exact floor, as many as the published code has."""
    index = offset_index(queries, keys, torch.device("cpu"))
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    floor = max(queries, keys) * (i * keys + (keys - 1 - j) * queries) // (queries * keys)  # in whole numbers
    assert int((index == floor - 1).sum()) == lower
    assert int((index == floor).sum()) == queries * keys - lower
    assert index.min() == 0


@torch.inference_mode()
def test_clips_of_any_length() -> None:
    model = small("mvitv2_small_16x4")
    for frames, t in ((1, 1), (4, 2), (7, 4)):
        maps = model.forward_intermediates(torch.randn(1, 3, frames, 37, 50), intermediates_only=True)
        assert [tuple(m.shape[2:]) for m in maps] == [(t, 10, 13), (t, 5, 7), (t, 3, 4), (t, 2, 2)]
    with pytest.raises(ValueError, match="clips"):
        model(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["mvitv2_large", "mvitv2_base_cls"])
def test_flat_block_numbers_come_back(name: str) -> None:
    """Both ways of widening, unequal depths."""
    state = small(name, depths=(2, 1, 3, 2)).state_dict()
    published = MViTv2.to_published(state)
    assert {key.split(".")[1] for key in published if key.startswith("blocks.")} == set(map(str, range(8)))
    ours = MViTv2.from_published(published)
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[key], state[key]) for key in state)


@torch.inference_mode()
def test_tables_of_another_native_size_are_resized() -> None:
    model = as_a(MViTv2, create_model("mvitv2_tiny", depths=(1, 1, 1, 1), embed_dim=16, img_size=128))
    state = create_model("mvitv2_tiny", depths=(1, 1, 1, 1), embed_dim=16).state_dict()
    resized = model.fit_tables(state)
    assert resized
    assert all(".rel_pos_" in key for key in resized)
    model.load_state_dict({**state, **resized})
