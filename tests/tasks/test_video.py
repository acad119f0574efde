"""Divided space–time attention: starts as the image model, then does what its equations say; video networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import group_parameters
from torch import Tensor

from anyres.errors import UserError
from anyres.io.hub import read_folder
from anyres.models._backbone import Backbone
from anyres.models._checkpoints import save_weights
from anyres.models._registry import create_model
from anyres.models.mvitv2 import MViTv2
from anyres.tasks.video.network import RegionTime, SpaceTime, create_video_model
from tests.typed import as_a

PLAIN: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 8, "img_size": 32}
REGION: dict[str, Any] = {"embed_dims": (32, 64, 128, 256), "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "resformer": ("resformer_tiny", PLAIN),
    "deit": ("deit_tiny", PLAIN),
    "distilled": ("deit_tiny_distilled", PLAIN),
    "no class token": ("uvit_tiny", PLAIN),
    "windows": ("uvit_tiny", {**PLAIN, "windows": (1, 2, 2)}),
    "rotary": ("resformer_tiny", {**PLAIN, "embed_dim": 96, "position": "rlpe"}),
    "mean": ("resformer_tiny", {**PLAIN, "global_pool": "avg"}),
    "region": ("regionvit_tiny", REGION),
    "region with peg": ("regionvit_small_w14_peg", {**REGION, "depths": (2, 2, 2, 2)}),
}
every_model = pytest.mark.parametrize("kind", MODELS)


def build(kind: str, **options: Any) -> SpaceTime:
    torch.manual_seed(0)
    name, args = MODELS[kind]
    return SpaceTime.build(name, 5, args, **options).eval()


def filled(model: SpaceTime) -> SpaceTime:
    """Nothing left at zero: what time adds shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (model.time, *model.temporal.parameters()):
            parameter.normal_(std=0.3)
    return model


def image_model(kind: str, video: SpaceTime) -> Backbone:
    """The image classifier with the video's weights; a distilled model's two heads are the video's one."""
    name, args = MODELS[kind]
    model = as_a(Backbone, create_model(name, num_classes=5, **args)).eval()
    state = dict(video.backbone.state_dict())
    for key, tensor in video.head.state_dict().items():
        state |= {f"{head}.{key}": tensor for head in ("head", "head_dist") if hasattr(model, head)}
    model.load_state_dict(state)
    return model


def clip(frames: int = 4, height: int = 40, width: int = 52, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(2))


@every_model
@pytest.mark.parametrize("gradients", [True, False])
def test_a_fresh_model_on_a_still_clip_is_the_image_model(kind: str, gradients: bool) -> None:
    video = build(kind)
    image = image_model(kind, video)
    x = clip(1)[:, :, 0]
    with torch.set_grad_enabled(gradients):
        still = video.forward_train(x[:, :, None].expand(-1, -1, 5, -1, -1), ("cls", "gap"))
        expected = image.forward_train(x, ("cls", "gap"))
        torch.testing.assert_close(still["logits"], image(x), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(still["gap"], expected["gap"], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["no class token", "mean", "region"])
def test_a_fresh_model_without_class_token_averages_its_frames(kind: str) -> None:
    video = build(kind)
    if kind == "mean":  # its class token, averaged over frames, acts on the patches: taken away
        backbone: Any = video.backbone
        torch.nn.init.zeros_(backbone.cls_token)
        for block in backbone.blocks:
            torch.nn.init.zeros_(block.attn.proj.weight)
    image, x = image_model(kind, video), clip()
    with torch.no_grad():
        expected = torch.stack([image.forward_train(x[:, :, t])["cls"] for t in range(4)]).mean(0)
        torch.testing.assert_close(video.forward_train(x)["cls"], expected, atol=2e-6, rtol=1e-5)


def attend(layer: Any, x: Tensor) -> Tensor:
    """Softmax attention written out."""
    batch, tokens, dim = x.shape
    q, k, v = layer.qkv(x).reshape(batch, tokens, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1)
    return layer.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


@torch.no_grad()
def test_the_equations_written_out_in_the_published_layout() -> None:
    """Tokens (B, 1 + N·T, D), space outer, time inner, one class token."""
    model = filled(build("deit", num_frames=4))
    backbone: Any = model.backbone
    x = clip()
    B, T, D = 2, 4, 48
    frames = torch.stack([backbone.embed(x[:, :, t])[0] for t in range(T)], dim=1)
    N = frames.shape[2] - 1
    cls, patches = frames[:, 0, :1], (frames[:, :, 1:] + model.time[:, :, None]).transpose(1, 2)
    parts: Any = model.temporal
    for block, part in zip(backbone.blocks, parts, strict=True):
        lines = patches.reshape(B * N, T, D)
        patches = patches + part.fc(attend(part.attn, part.norm(lines))).view(B, N, T, D)
        space = torch.cat((cls[:, None].expand(-1, T, -1, -1), patches.transpose(1, 2)), dim=2)
        residual = attend(block.attn, block.norm1(space.flatten(0, 1))).view(B, T, 1 + N, D)
        cls = cls + residual[:, :, :1].mean(1)
        patches = patches + residual[:, :, 1:].transpose(1, 2)
        tokens = torch.cat((cls, patches.flatten(1, 2)), dim=1)
        tokens = tokens + block.mlp(block.norm2(tokens))
        cls, patches = tokens[:, :1], tokens[:, 1:].view(B, N, T, D)
    tokens = backbone.norm(torch.cat((cls, patches.flatten(1, 2)), dim=1))
    out = model.forward_train(x, ("cls", "gap"))
    torch.testing.assert_close(out["cls"], tokens[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out["gap"], tokens[:, 1:].mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x), model.head(tokens[:, 0]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_local_positions_act_in_space_only_and_start_copied() -> None:
    model = build("resformer")
    backbone: Any = model.backbone
    parts: Any = model.temporal
    for block, part in zip(backbone.blocks, parts, strict=True):
        assert block.attn.local is not None
        assert part.attn.local is None
        assert torch.equal(part.attn.qkv.weight, block.attn.qkv.weight)
        assert torch.equal(part.norm.weight, block.norm1.weight)
        assert not part.fc.weight.any()
    assert not model.time.any()


@every_model
@torch.no_grad()
def test_any_size_any_length_and_no_mixing_in_a_batch(kind: str) -> None:
    model = filled(build(kind, num_frames=3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for frames, height, width in ((3, 33, 47), (1, 40, 32), (5, 64, 97)):
        x = clip(frames, height, width)
        logits = model(x)
        assert logits.shape == (2, 5)
        torch.testing.assert_close(logits, torch.cat([model(one[None]) for one in x]), atol=3e-6, rtol=1e-4)
        torch.testing.assert_close(logits, model.forward_train(x, ("cls", "gap"))["logits"], atol=3e-6, rtol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["resformer", "region"])
@torch.no_grad()
def test_the_order_of_frames_counts(kind: str) -> None:
    model, x = filled(build(kind, num_frames=4)), clip()
    assert (model(x) - model(x.flip(2))).abs().max() > 1e-3
    torch.nn.init.zeros_(model.time)
    torch.testing.assert_close(model(x), model(x.flip(2)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["resformer", "region"])
@torch.no_grad()
def test_a_scaled_start_knows_the_order_and_adds_no_time_attention_yet(kind: str) -> None:
    model = build(kind)
    model.init_scaled()
    assert model.time.std() == pytest.approx(0.5, rel=0.2)
    for name, layer in model.temporal.named_modules():
        if name.endswith("qkv"):
            qkv = as_a(torch.nn.Linear, layer)
            assert qkv.weight.std() == pytest.approx(qkv.in_features**-0.5, rel=0.1)
    torch.nn.init.zeros_(model.time)
    x = clip(1)[:, :, 0]
    expected = image_model(kind, model)(x)
    torch.testing.assert_close(model(x[:, :, None].expand(-1, -1, 3, -1, -1)), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_table_of_time_is_read_at_the_nearest_row() -> None:
    model = build("deit", num_frames=2)
    model.time.copy_(torch.tensor([1.0, 2.0])[:, None].expand(1, 2, 48))
    assert model.time_at(4)[0, :, 0].tolist() == [1, 1, 2, 2]
    assert model.time_at(1)[0, :, 0].tolist() == [1]


@every_model
def test_gradients_reach_every_parameter_and_checkpointing_keeps_them(kind: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor | None]:
        model = filled(build(kind, num_frames=3)).train()
        model.set_grad_checkpointing(checkpointing)
        out = model.forward_train(clip(3, 40, 64), ("cls", "gap"))
        generator = torch.Generator().manual_seed(5)
        terms = [(value * torch.randn(value.shape, generator=generator)).sum() for value in out.values()]
        torch.stack(terms).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert gradient is not None, name
        assert gradient.any() or name.endswith("qkv.bias"), name
        torch.testing.assert_close(gradient, checkpointed[name])


def test_drop_path_leaves_one_class_token() -> None:
    torch.manual_seed(0)
    model = filled(SpaceTime.build("deit_tiny", 5, {**PLAIN, "drop_path_rate": 0.7})).train()
    seen = []
    model.backbone.get_submodule("norm").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = model.forward_train(clip(), ("gap",))
    classes = seen[0].unflatten(0, (2, 4))[:, :, 0]
    torch.testing.assert_close(classes, classes[:, :1].expand_as(classes))
    assert (model(clip()) - out["logits"]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["resformer", "region"])
def test_image_weights_come_from_a_file(kind: str, tmp_path: Path) -> None:
    name, args = MODELS[kind]
    image = as_a(Backbone, create_model(name, num_classes=9, **args))
    with torch.no_grad():
        for parameter in image.parameters():
            parameter.normal_(std=0.1)
    save_weights(type(image).to_published(image.state_dict()), tmp_path / "image.pth")
    video = build(kind)
    filled(video)
    report = video.load_image_weights(tmp_path / "image.pth")
    assert set(report.unexpected) <= {"head.weight", "head.bias"}
    x = clip(1)[:, :, 0]
    with torch.no_grad():
        video.time.zero_()
        expected = image.eval().forward_train(x)["cls"]
        torch.testing.assert_close(video.forward_train(x[:, :, None])["cls"], expected, atol=1e-5, rtol=1e-4)
    save_weights(create_model("deit_tiny", **PLAIN).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth does not fit"):
        video.load_image_weights(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError):
        video.load_image_weights(tmp_path / "none.pth")


@pytest.mark.parametrize("kind", ["distilled", "region"])
@torch.no_grad()
def test_a_saved_model_comes_back(kind: str, tmp_path: Path) -> None:
    model = filled(build(kind, num_frames=3))
    model.pretrained_cfg["label_names"] = ["a", "b", "c", "d", "e"]
    config, state = read_folder(model.save_pretrained(tmp_path / "model"))
    assert config["task"] == "video"
    back = SpaceTime.from_config(config, state)
    assert type(back) is type(model)
    assert back.num_frames == 3
    assert back.pretrained_cfg["label_names"] == ["a", "b", "c", "d", "e"]
    assert torch.equal(back(clip()), model(clip()))


@pytest.mark.parametrize("kind", ["resformer", "region"])
def test_layers_for_layer_wise_learning_rates(kind: str) -> None:
    model = build(kind)
    groups: dict[Any, list[str]] = group_parameters(model, model.group_matcher())
    place = {name: group for group, names in groups.items() for name in names}
    assert len(place) == len(list(model.parameters()))
    assert place["time"] == min(place.values())
    assert place["head.weight"] == max(place.values())
    if kind == "resformer":
        assert place["temporal.1.fc.weight"] == place["backbone.blocks.1.attn.qkv.weight"]
    else:
        assert place["temporal.0.1.attn.qkv.weight"] == place["backbone.stages.0.blocks.1.attn.qkv.weight"]
        assert group_parameters(model, model.group_matcher(coarse=True))
    assert "time" in model.no_weight_decay()


def test_parameters_of_the_published_sizes() -> None:
    with torch.device("meta"):
        model = SpaceTime.build("deit_base", 400)
    assert sum(parameter.numel() for parameter in model.parameters()) == 121_566_352


def test_create_video_model_knows_what_has_a_video_form() -> None:
    assert type(create_video_model("deit_tiny", 3, **PLAIN)) is SpaceTime
    assert type(create_video_model("regionvit_tiny", 3, **REGION)) is RegionTime
    network = create_video_model("mvitv2_s_16x4", 3, num_frames=4, embed_dim=16, depths=(1, 1, 1, 1))
    assert isinstance(network, MViTv2)
    assert network.num_frames == 4
    assert network(clip()).shape == (2, 3)
    for name in ("swin_tiny", "gpvit_l1", "mvitv2_tiny"):
        with pytest.raises(UserError, match=rf"{name} has no video form: .*resformer.*mvitv2_small_16x4"):
            create_video_model(name, 3)
    with pytest.raises(UserError, match="no option"):
        create_video_model("deit_tiny", 3, colour=1)
    with pytest.raises(UserError, match="num_frames is 0"):
        create_video_model("deit_tiny", 3, num_frames=0, **PLAIN)


def test_inputs_that_are_no_clips_are_refused_in_a_sentence() -> None:
    model = build("resformer")
    for shape in ((2, 3, 32, 32), (2, 1, 4, 32, 32), (2, 3, 0, 32, 32)):
        with pytest.raises(ValueError, match="takes clips"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"7x50.*at least 8"):
        model(torch.zeros(1, 3, 2, 7, 50))
