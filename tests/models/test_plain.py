"""The plain skeleton: its fast paths and options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from anyres.layers.attention import Attention
from anyres.layers.positions import centred_coordinates
from anyres.models._plain import Plain
from anyres.models._positions import POSITIONS
from anyres.models._registry import create_model
from tests.typed import as_a

SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7, "patch_size": 8, "img_size": 32}


def filled(model: torch.nn.Module) -> Plain:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return as_a(Plain, model).eval()


def explicit_attention(layer: Attention, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The published arithmetic, written out: softmax matrix, values folded over heads for the local term."""
    batch, tokens, dim = x.shape
    prefix = tokens - grid[0] * grid[1]
    q, k, v = layer.qkv(x).reshape(batch, tokens, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if layer.bias is not None:
        logits = logits + layer.bias(grid, prefix, q)
    if layer.parabolas is not None:
        curvature, slope = layer.parabolas.coefficients(q[:, :, prefix:])
        places = centred_coordinates(grid, 0, x.device)[:, 1:]
        delta = places[None] - places[:, None]
        bias = torch.einsum("bhqi,qki->bhqk", slope, delta)
        bias = bias - torch.einsum("bhqij,qki,qkj->bhqk", curvature, delta, delta)
        logits = logits + F.pad(bias, (prefix, 0, prefix, 0))
    out = logits.softmax(-1) @ v
    if layer.local is not None:
        maps = v[:, :, prefix:].transpose(-1, -2).reshape(batch * layer.num_heads, -1, *grid)
        local = layer.local.conv(maps).flatten(2).transpose(1, 2).unflatten(0, (batch, layer.num_heads))
        out = out + F.pad(local, (0, 0, prefix, 0))
    return layer.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


@pytest.mark.parametrize("position", ["ape", "glpe", "fire", "lookhere", "pape", "pape_ri"])
@pytest.mark.parametrize("grad", [True, False])
def test_attention_equals_its_explicit_twin(position: str, grad: bool) -> None:
    model = filled(create_model("resformer_tiny", **SMALL, position=position))
    layer = as_a(Attention, model.get_submodule("blocks.0.attn"))
    x = torch.randn(2, 1 + 15, 48)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x, (3, 5)), explicit_attention(layer, x, (3, 5)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_runs_at_any_size_and_the_short_way_equals_the_long(position: str) -> None:
    model = filled(create_model("resformer_tiny", **SMALL, position=position))
    for size in ((32, 32), (17, 50), (8, 8)):
        x = torch.randn(2, 3, *size)
        short, long = model(x), model.forward_head(model.forward_features(x))
        torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("position", [p for p in POSITIONS if p != "none"])
def test_positions_tell_tokens_apart(position: str) -> None:
    """Without position information a shuffle of the patches changes nothing; each of the schemes must notice it."""
    torch.manual_seed(0)
    model = filled(create_model("resformer_tiny", **SMALL, position=position))
    blind = filled(create_model("resformer_tiny", **SMALL, position="none"))
    x = torch.randn(1, 3, 32, 32)
    swapped = torch.cat((x[..., 16:], x[..., :16]), dim=-1)
    torch.testing.assert_close(blind(x), blind(swapped), atol=1e-4, rtol=1e-4)
    assert (model(x) - model(swapped)).norm() > 1e-3 * model(x).norm()


@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_is_trained_without_a_state(position: str) -> None:
    # The class token alone would not read what the last block's patches do with their positions.
    model = filled(
        create_model(
            "resformer_tiny", **SMALL, position=position, position_args={"log_scale": "learnt"}, global_pool="avg"
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("log_threshold"):  # which counts for images below it
            torch.nn.init.constant_(parameter, 3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 3, 24, 40)  # not the native size, at which the exponent of the log scale has nothing to do
    together = model(x)
    model(torch.randn(1, 3, 64, 16))
    torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), together, atol=1e-5, rtol=1e-5)
    together.square().sum().backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert still == []
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_position_args_change_one_part_of_a_position() -> None:
    """The whole position, taken apart and put together from another: the same network, to the last number."""
    parts = {"rotary": True, "jitter": [0.75, 1.25], "log_scale": "fixed"}
    whole = filled(create_model("resformer_tiny", **SMALL, position="rlpe"))
    built = as_a(Plain, create_model("resformer_tiny", **SMALL, position="lpe", position_args=parts)).eval()
    without = as_a(
        Plain, create_model("resformer_tiny", **SMALL, position="rlpe", position_args={"log_scale": None})
    ).eval()
    for model in (built, without):
        model.load_state_dict(whole.state_dict())
    x = torch.randn(1, 3, 48, 40)
    assert torch.equal(built(x), whole(x))
    assert (without(x) - whole(x)).norm() > 1e-3 * whole(x).norm()
    steady = as_a(Plain, create_model("resformer_tiny", **SMALL, position="rlpe", position_args={"jitter": None}))
    for model, steadily in ((built, False), (steady, True)):
        model.train()
        assert torch.equal(model(x), model(x)) is steadily


def test_position_args_are_part_of_a_saved_model(tmp_path: Path) -> None:
    args = {"log_scale": "learnt", "jitter": None}
    model = filled(create_model("resformer_tiny", **SMALL, position="rlpe", position_args=args))
    model.save_pretrained(tmp_path / "model")
    again = create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    x = torch.randn(1, 3, 48, 40)
    assert torch.equal(again(x), model(x))
    assert "log_scale.exponent" in model.no_weight_decay()


def test_padding_and_truncation() -> None:
    pad = filled(create_model("resformer_tiny", **SMALL))
    x = torch.randn(1, 3, 33, 40)
    torch.testing.assert_close(pad(x), pad(F.pad(x, (0, 0, 0, 7))))
    cut = as_a(Plain, create_model("resformer_tiny", **SMALL, remainder="truncate")).eval()
    cut.load_state_dict(pad.state_dict())
    torch.testing.assert_close(cut(x), pad(x[:, :, :32]))
    assert pad.feature_sizes(33, 40)[0] == (5, 5)
    assert cut.feature_sizes(33, 40)[0] == (4, 5)


def test_drop_path_rises_linearly_from_zero() -> None:
    model = as_a(Plain, create_model("resformer_tiny", **{**SMALL, "depth": 5}, drop_path_rate=0.2))
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_published_training_leaves_these_without_decay() -> None:
    names = as_a(Plain, create_model("resformer_tiny", **SMALL)).no_weight_decay()
    assert "cls_token" in names
    assert "position.conv.weight" in names
    assert "blocks.0.attn.local.conv.weight" in names
    assert not any("qkv" in name or "patch_embed" in name for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": "rop"}, "position='rop'"),
        (
            {"position": "rlpe", "position_args": {"jiter": None}},
            "jiter.*tokens, resize, logits, rotary, local, ji",
        ),
        ({"position_args": "jitter"}, "must map names to values"),
        ({"position_args": {"logits": "tabel"}}, "logits is 'tabel'; it must be one of table, "),
        ({"position_args": {"log_scale": True}}, "log_scale is True; it must be one of fixed, learnt, clamped or none"),
        (
            {"position": "rope", "position_args": {"jitter": [2, 1]}},
            "jitter is .* two numbers above 0 in ascending order",
        ),
        ({"position": "rlpe", "position_args": {"rotary": False}}, "jitter=.* set jitter=None"),
        ({"remainder": "crop"}, "remainder of resformer_tiny is 'crop'"),
        ({"num_heads": 5}, "5 heads"),
        ({"global_pool": "max"}, "global_pool='max'"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("resformer_tiny", **{**SMALL, **options})


def test_smp_decoder_on_a_plain_encoder() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    # DPT is the decoder that takes maps of one stride; it wants its encoder's native size divisible by the patch.
    model = smp.DPT(
        "tu-anyres_deit_tiny", encoder_weights=None, encoder_depth=4, classes=3, dynamic_img_size=True
    ).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 96, 160)).shape == (1, 3, 96, 160)
