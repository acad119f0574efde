"""Windows with a regional token, and what padding may do."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from anyres.models._registry import create_model
from anyres.models.regionvit import (
    RegionalToLocalAttention,
    RegionViT,
    to_maps,
    to_windows,
    window_bias,
    wrapped_index,
)
from tests.contract.small import image, small


@pytest.mark.parametrize(("grid", "regions"), [((8, 12), (2, 3)), ((7, 9), (2, 3)), ((3, 2), (1, 1)), ((4, 8), (2, 2))])
def test_maps_come_back_from_windows(grid: tuple[int, int], regions: tuple[int, int]) -> None:
    local, regional = torch.randn(2, *grid, 6), torch.randn(2, *regions, 6)
    tokens, padding = to_windows(local, regional, 4)
    assert tokens.shape == (2, regions[0] * regions[1], 17, 6)
    for ours, expected in zip(to_maps(tokens, regions, padding, 4), (local, regional), strict=True):
        assert torch.equal(ours, expected)


def test_bias_wraps_around() -> None:
    index = wrapped_index(7, torch.device("cpu"))
    assert index[0, 0] == 3 * 13 + 3  # no offset: the middle of a window
    assert index[0, 48] == 9 * 13 + 9  # six down, six right
    assert index[48, 0] == 10 * 13 + 10  # six up, six left: -3 wraps to 10


@torch.no_grad()
def test_clean_windows_see_no_padding() -> None:
    """Against every window's attention over its real tokens alone."""
    torch.manual_seed(0)
    attention = RegionalToLocalAttention(8, 2, 4, "clean")
    local, regional = torch.randn(1, 7, 9, 8), torch.randn(1, 2, 3, 8)
    tokens, padding = to_windows(local, regional, 4)
    out_local, out_regional = to_maps(attention(tokens, (2, 3), padding), (2, 3), padding, 4)
    bias = window_bias(attention.rel_pos, 4, (0, 0), True)
    for row in range(2):
        for column in range(3):
            cut = local[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            h, w = cut.shape[:2]
            real = [0, *(1 + 4 * y + x for y in range(h) for x in range(w))]
            x = torch.cat((regional[0, row, column][None], cut.reshape(-1, 8)))
            q, k, v = attention.qkv(x).view(-1, 3, 2, 4).permute(1, 2, 0, 3)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[0][:, real][:, :, real])
            expected = attention.proj(attended.transpose(0, 1).flatten(1))
            ours = out_local[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1, 8)
            assert torch.allclose(ours, expected[1:], atol=1e-6)
            assert torch.allclose(out_regional[0, row, column], expected[0], atol=1e-6)


@torch.inference_mode()
def test_paddings_differ_only_where_something_is_padded() -> None:
    published, clean = small("regionvit_tiny"), small("regionvit_tiny", padding="clean")
    # 28 pixels per region: both stages of the first two halvings of 8 x 12 regions come out even.
    even, odd = (image(1, size, published) for size in ((224, 224), (97, 131)))
    assert torch.equal(published(even), clean(even))
    assert not torch.allclose(published(odd), clean(odd))
    assert clean(odd).isfinite().all()


@torch.inference_mode()
def test_another_window_is_resized_as_published() -> None:
    state = small("regionvit_tiny").state_dict()
    wide = small("regionvit_tiny", window=14)
    resized = wide.fit_tables(state)
    name = "stages.1.blocks.0.attn.rel_pos"
    expected = F.interpolate(state[name].view(1, -1, 13, 13), (27, 27), mode="bicubic").view(-1, 27 * 27)
    assert torch.allclose(resized[name], expected, atol=1e-5)
    wide.load_state_dict({**state, **resized})
    assert resized["stages.0.regional.weight"].shape == (16, 3, 56, 56)


def test_mistakes_get_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"padding of regionvit_tiny is 'both'.*clean"):
        create_model("regionvit_tiny", padding="both")
    with pytest.raises(ValueError, match="stem_depth of RegionViT is 2"):
        RegionViT(stem_depth=2)  # type: ignore[arg-type]  # the mistake
    with pytest.raises(ValueError, match="at least 2 blocks"):
        RegionViT(depths=(1, 2, 2, 2), peg=True)
