from __future__ import annotations

import pytest
import torch

from anyres.layers.maps import on_map
from anyres.models.scalablevit import InteractiveWindowAttention, ScalableAttention, ScalableViT
from tests.contract.small import image, small
from tests.typed import as_a


@pytest.mark.parametrize("grid", [(14, 7), (9, 10), (3, 2)], ids=str)
@torch.inference_mode()
def test_windows_at_the_edge_are_smaller_windows(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    attn = InteractiveWindowAttention(12, 2, 7)
    x = torch.randn(2, *grid, 12)
    q, k, v = attn.qkv(x).unflatten(3, (3, 2, 6)).permute(3, 0, 4, 1, 2, 5)
    expected = torch.zeros(2, *grid, 12)
    for top in range(0, grid[0], 7):
        for left in range(0, grid[1], 7):
            window = (..., slice(top, top + 7), slice(left, left + 7), slice(None))
            shape = q[window].shape
            weights = (q[window].flatten(2, 3) @ k[window].flatten(2, 3).transpose(2, 3) * 6**-0.5).softmax(-1)
            y = (weights @ v[window].flatten(2, 3)).view(shape)
            expected[window] = y.permute(0, 2, 3, 1, 4).flatten(3)
    v_map = v.permute(0, 2, 3, 1, 4).flatten(3)
    assert torch.allclose(attn(x), attn.proj(expected + on_map(attn.local, v_map)), atol=1e-6)


@pytest.mark.parametrize("ratio", [0.5, 1, 1.5])
@torch.inference_mode()
def test_scalable_attention_against_its_equation(ratio: float) -> None:
    """Queries and keys narrower and wider than the values, and a map that the reduction does not divide."""
    torch.manual_seed(0)
    attn = ScalableAttention(16, 2, 4, ratio)
    x = torch.randn(2, 9, 6, 16)
    reduced = attn.reduce(x)
    assert reduced.shape == (2, 3 * 2, 16 * ratio)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 2, 0, 3))
    assert torch.allclose(attn.reduce(padded), reduced)
    q, k, v = (
        y.unflatten(2, (2, -1)).transpose(1, 2) for y in (attn.q(x.flatten(1, 2)), attn.k(reduced), attn.v(reduced))
    )
    weights = (q @ k.transpose(2, 3) * (8 * ratio) ** -0.5).softmax(-1)
    expected = attn.proj((weights @ v).transpose(1, 2).flatten(2)).view(x.shape)
    assert torch.allclose(attn(x), expected, atol=1e-6)


@torch.inference_mode()
def test_head_with_and_without_hidden_layer() -> None:
    for plain, width in ((False, 4096), (True, 48)):
        model = as_a(ScalableViT, small("scalablevit_small", plain_head=plain))
        x = image(2, (64, 64), model)
        hidden = model.forward_head(model.forward_features(x), pre_logits=True)
        assert hidden.shape == (2, width) == (2, model.head_hidden_size)
        assert torch.equal(model.get_classifier()(hidden), model(x))
        names = type(model).to_published(model.state_dict())
        assert ("head.weight" in names) == plain
        assert ("head.3.weight" in names) != plain
    model = as_a(ScalableViT, small("scalablevit_small"))
    kept = model.get_parameter("hidden.0.weight")
    model.reset_classifier(3)
    assert model.get_parameter("hidden.0.weight") is kept
    model.prune_intermediate_layers([0])
    assert not list(model.hidden.parameters())
