"""Weights files of other libraries: built by those libraries here, loaded, and compared by their outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import QuickGELU
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import Tensor, nn

from anyres.errors import UserError
from anyres.models import _registry
from anyres.models._backbone import Backbone
from anyres.models._checkpoints import load_checkpoint
from anyres.models._registry import create_model, entries, guess_model
from anyres.models.swin import PatchMerging, SwinTransformer
from anyres.tasks import load_pretrained
from anyres.tasks.classification import TASK
from tests.typed import as_a


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter and running statistic a value that leaves a trace in the output."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            one = tensor.ndim == 1 and name.endswith(("weight", "running_var"))
            tensor.copy_(1 + 0.1 * noise.abs() if one else noise * 0.1)
    return model.eval()


def compare(theirs: nn.Module, name: str, path: Path, library: str, size: int, **args: Any) -> None:
    """Their file loads completely, and both networks give the same logits."""
    save_file({key: tensor.contiguous() for key, tensor in theirs.state_dict().items()}, path)
    ours = as_a(Backbone, create_model(name, num_classes=5, **args)).eval()
    report = load_checkpoint(ours, path)
    assert report.complete
    assert report.library == library
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = theirs(x)
    expected = expected if isinstance(expected, Tensor) else expected.logits
    logits = ours(x)
    assert logits.isfinite().all()
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert logits.std() > 1e-3


TIMM: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 6)},
        {"name": "swin_tiny"},
        "timm",
    ),
    "pvt v2": ("pvt_v2_b1", {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 80, 128)}, {"name": "pvt_v2_b1"}, "timm"),
    "pvt v2, linear": (
        "pvt_v2_b2_li",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 80, 128)},
        {"name": "pvt_v2_b2_li"},
        "timm",
    ),
    "deit": ("deit_tiny_patch16_224", {"depth": 2}, {"name": "deit_tiny"}, ""),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {"depth": 2}, {"name": "deit_tiny_distilled"}, ""),
    "twins, pcpvt": (
        "twins_pcpvt_small",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 80, 128)},
        {"name": "twins_pcpvt_small"},
        "",
    ),
    "twins, svt": (
        "twins_svt_small",
        {"depths": (2, 2, 2, 2), "embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8)},
        {"name": "twins_svt_small"},
        "",
    ),
}


@pytest.mark.parametrize("system", TIMM)
@torch.inference_mode()
def test_files_of_timm(system: str, tmp_path: Path) -> None:
    name, args, ours, library = TIMM[system]
    theirs = randomise(timm.create_model(name, num_classes=5, **args))
    compare(theirs, path=tmp_path / "x.safetensors", library=library, size=224, **args, **ours)


MVIT: dict[str, Any] = {"depths": (1, 2, 1, 2), "embed_dim": 24, "num_heads": 1}


@pytest.mark.parametrize("name", ["mvitv2_tiny", "mvitv2_large"])
@torch.inference_mode()
def test_files_of_timms_mvitv2(name: str, tmp_path: Path) -> None:
    config = MultiScaleVitCfg(**MVIT, expand_attn=name != "mvitv2_large")
    compare(randomise(MultiScaleVit(config, num_classes=5)), name, tmp_path / "x.safetensors", "timm", 224, **MVIT)


@torch.inference_mode()
def test_files_of_timms_mvitv2_with_a_class_token(tmp_path: Path) -> None:
    """timm adds the pooled query to the class token too, which the published network does not do: until attention
    spreads it, only the other tokens can agree."""
    theirs = MultiScaleVit(MultiScaleVitCfg(**MVIT, use_cls_token=True), num_classes=5)
    randomise(theirs)
    save_file(theirs.state_dict(), tmp_path / "x.safetensors")
    ours = as_a(Backbone, create_model("mvitv2_base_cls", num_classes=5, **MVIT)).eval()
    assert load_checkpoint(ours, tmp_path / "x.safetensors").complete
    seen: list[Tensor] = []
    for model in (theirs, ours):
        block = model.get_submodule("stages.0.blocks.0")
        block.register_forward_hook(lambda *call: seen.append(call[-1][0] if isinstance(call[-1], tuple) else call[-1]))
        model(torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1)))
    expected, found = (tokens[:, 1:] for tokens in seen)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def transformers_model(system: str) -> tuple[nn.Module, str, dict[str, Any], int]:
    """Their network, the name and arguments of ours, and an input size."""
    from transformers import (
        CvtConfig,
        CvtForImageClassification,
        DeiTConfig,
        DeiTForImageClassificationWithTeacher,
        PvtConfig,
        PvtForImageClassification,
        PvtV2Config,
        PvtV2ForImageClassification,
        SwinConfig,
        SwinForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    labels: dict[str, Any] = {"num_labels": 5}
    plain: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 64}
    plain |= {"intermediate_size": 192, "layer_norm_eps": 1e-6, **labels}
    deit = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64}
    match system:
        case "swin":
            args: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 6)}
            return SwinForImageClassification(SwinConfig(image_size=224, **labels, **args)), "swin_tiny", args, 224
        case "deit":
            return DeiTForImageClassificationWithTeacher(DeiTConfig(**plain)), "deit_tiny_distilled", deit, 64
        case "vit":
            return ViTForImageClassification(ViTConfig(**plain)), "deit_tiny", deit, 64
        case "cvt":
            args = {"embed_dims": (16, 32, 48), "num_heads": (1, 2, 3), "depths": (1, 2, 3)}
            sizes: dict[str, Any] = {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}
            cvt = CvtForImageClassification(CvtConfig(**labels, **sizes))
            for module in cvt.modules():
                if isinstance(getattr(module, "activation", None), nn.GELU):
                    module.activation = QuickGELU()  # as published; transformers has another one
            return cvt, "cvt_13", args, 96
        case "pvt":
            args = {"embed_dims": (16, 32, 80, 128), "depths": (1, 1, 1, 1), "img_size": 64}
            sizes = {"hidden_sizes": [16, 32, 80, 128], "depths": [1, 1, 1, 1], "image_size": 64}
            return PvtForImageClassification(PvtConfig(**labels, **sizes)), "pvt_tiny", args, 64
        case _:
            linear = system == "pvt_v2, linear"
            args = {"embed_dims": (16, 32, 80, 128), "depths": (1, 1, 1, 1)}
            sizes = {"hidden_sizes": [16, 32, 80, 128], "depths": [1, 1, 1, 1], "linear_attention": linear}
            theirs = PvtV2ForImageClassification(PvtV2Config(mlp_ratios=[8, 8, 4, 4], **labels, **sizes))
            for name, module in theirs.named_modules():
                if name.endswith(("patch_embedding.layer_norm", "attention.layer_norm")):
                    module.eps = 1e-5  # as published; transformers has the same 1e-6 everywhere
            return theirs, "pvt_v2_b2_li" if linear else "pvt_v2_b2", args, 96


@pytest.mark.parametrize("system", ["swin", "deit", "vit", "cvt", "pvt", "pvt_v2", "pvt_v2, linear"])
@torch.inference_mode()
def test_files_of_transformers(system: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    theirs, name, args, size = transformers_model(system)
    compare(randomise(theirs), name, tmp_path / "x.safetensors", "transformers", size, **args)


OLD_NAMES = (
    (r"^deit\.layers\.", "deit.encoder.layer."),
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"layer\.(\d+)\.attention\.(\w)_proj", r"layer.\1.attention.attention.\2"),
    (r"blocks\.(\d+)\.attention\.(\w)_proj", r"blocks.\1.attention.self.\2"),
    (r"attention\.(?:self|attention)\.o\.", "attention.output.dense."),
    (r"\.relative_position_bias\.relative", ".self.relative"),
    (r"(attention)\.q\.", r"\1.query."),
    (r"(attention)\.k\.", r"\1.key."),
    (r"(attention)\.v\.", r"\1.value."),
    (r"self\.q\.", "self.query."),
    (r"self\.k\.", "self.key."),
    (r"self\.v\.", "self.value."),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)
"""From the names of version 5 to those of files that earlier versions wrote, which are most files."""


@pytest.mark.parametrize("system", ["swin", "deit", "vit"])
def test_earlier_names_of_transformers(system: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    theirs, name, args, _ = transformers_model(system)
    state = {}
    for key, tensor in theirs.state_dict().items():
        for pattern, replacement in OLD_NAMES:
            key = re.sub(pattern, replacement, key)
        state[key] = tensor
    assert any("attention.query" in key or "self.query" in key for key in state)
    assert any(re.search(r"(?<!attention\.)output\.dense", key) for key in state)
    save_file(state, tmp_path / "old.safetensors")
    save_file(theirs.state_dict(), tmp_path / "new.safetensors")
    old, new = (create_model(name, num_classes=5, **args) for _ in "12")
    assert load_checkpoint(old, tmp_path / "old.safetensors").complete
    load_checkpoint(new, tmp_path / "new.safetensors")
    assert all(torch.equal(tensor, new.state_dict()[key]) for key, tensor in old.state_dict().items())


# OpenMMLab, whose code does not install beside today's torch ----------------------------------------------------------


def test_openmmlab_orders_cells_by_channel() -> None:
    """Their merging unfolds the map, and so concatenates channel by channel."""
    torch.manual_seed(0)
    merging = PatchMerging(6, 12)
    nn.init.normal_(merging.norm.weight)
    nn.init.normal_(merging.norm.bias)
    x_BHWC = torch.randn(2, 8, 6, 6)
    unfolded = nn.functional.unfold(x_BHWC.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    expected = merging.reduction(merging.norm(unfolded)).unflatten(1, (4, 3))
    state = {f"stages.0.downsample.{key}": tensor for key, tensor in merging.state_dict().items()}
    layout = next(layout for layout in SwinTransformer.layouts if layout.library == "OpenMMLab")
    converted = layout.to_published(state)
    merging.load_state_dict({key.rpartition("downsample.")[2]: tensor for key, tensor in converted.items()})
    torch.testing.assert_close(merging(x_BHWC), expected)


def openmmlab_swin(state: dict[str, Tensor], dense: bool) -> dict[str, Tensor]:
    """The names that OpenMMLab gives to published Swin weights."""
    names = (
        (r"^patch_embed\.proj", "patch_embed.projection"),
        (r"^layers", "stages"),
        (r"attn\.", "attn.w_msa."),
        (r"mlp\.fc1", "ffn.layers.0.0"),
        (r"mlp\.fc2", "ffn.layers.1"),
        (r"^norm\.", "norm3."),
    )
    found = {}
    for key, tensor in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        key = key.replace("head.", "head.fc.") if key.startswith("head") else f"backbone.{key}"
        if "downsample" in key:
            tensor = tensor.unflatten(-1, (2, 2, -1)).movedim((-1, -2), (-3, -2)).flatten(-3)
        found[key] = tensor
    return found


@pytest.mark.parametrize("dense", [False, True])
@torch.inference_mode()
def test_swin_of_openmmlab(dense: bool, tmp_path: Path) -> None:
    args: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 6), "dense": dense}
    source = as_a(Backbone, create_model("swin_tiny", num_classes=5, **args)).eval()
    randomise(source)
    state = openmmlab_swin(source.to_published(source.state_dict()), dense)
    if dense:
        state |= {"decode_head.conv_seg.weight": torch.zeros(5, 8, 1, 1), "decode_head.conv_seg.bias": torch.zeros(5)}
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "x.pth")
    target = as_a(Backbone, create_model("swin_tiny", num_classes=5, **args)).eval()
    report = load_checkpoint(target, tmp_path / "x.pth")
    assert report.library == "OpenMMLab"
    assert all(torch.equal(tensor, target.state_dict()[key]) for key, tensor in source.state_dict().items())


def test_a_file_of_another_library_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: entries()[name] for name in ("mvitv2_small", "mvitv2_tiny", "swin_tiny")}
    monkeypatch.setattr(_registry, "entries", lambda: few)  # all of them would take seconds
    with torch.device("meta"):
        shapes = timm.create_model("mvitv2_tiny").state_dict()
    save_file({name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}, tmp_path / "x.safetensors")
    assert guess_model(tmp_path / "x.safetensors") == "mvitv2_tiny"


def test_pruned_networks_start_from_their_hosts_in_the_same_layouts(tmp_path: Path) -> None:
    args: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2, 6, 2), "num_heads": (1, 2, 3, 6), "num_classes": 5}
    host = timm.create_model("swin_tiny_patch4_window7_224", **args)
    save_file(host.state_dict(), tmp_path / "x.safetensors")
    report = load_checkpoint(create_model("dynamicvit_swin_tiny", **args), tmp_path / "x.safetensors", strict=False)
    assert report.library == "timm"
    assert not report.unexpected + report.mismatched
    assert all("predictors." in name or "fast_" in name for name in report.missing)


def test_names_of_nobody_are_refused(tmp_path: Path) -> None:
    save_file({"encoder.layer_0.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"0 of \d+ tensors loaded.*; \d+ missing.*: give a file of this model"):
        load_checkpoint(create_model("deit_tiny", depth=1), tmp_path / "x.safetensors")


def test_a_part_that_is_missing_is_never_made_up(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    theirs, name, args, _ = transformers_model("deit")
    state = {key: tensor for key, tensor in theirs.state_dict().items() if "layers.1.attention.k_proj" not in key}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.qkv"):
        load_checkpoint(create_model(name, num_classes=5, **args), tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "args"), [("swin_tiny_patch4_window7_224", {}), ("deit_tiny_patch16_224", {"img_size": 64})]
)
@torch.inference_mode()
def test_folders_that_timm_wrote_for_its_own_models(name: str, args: dict[str, Any], tmp_path: Path) -> None:
    theirs = randomise(timm.create_model(name, num_classes=5, **args))
    timm.models.save_for_hf(theirs, str(tmp_path), model_args=args, safe_serialization=True)
    ours = load_pretrained(tmp_path)
    size = args.get("img_size", 224)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = theirs(x)
    assert (ours(x) - expected).norm() <= 1e-5 * expected.norm()
    again = load_pretrained(ours.save_pretrained(tmp_path / "ours"))
    assert torch.equal(again(x), ours(x))
    of_timm = as_a(Backbone, timm.create_model(f"local-dir:{tmp_path / 'ours'}"))
    assert of_timm.pretrained_cfg["classifier"] == "head"


@torch.inference_mode()
def test_folders_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from transformers import SwinConfig, SwinForImageClassification

    few = {name: entries()[name] for name in ("mvitv2_tiny", "swin_small", "swin_tiny")}
    monkeypatch.setattr(_registry, "entries", lambda: few)  # all of them would take seconds
    labels = {0: "cat", 1: "dog", 2: "owl"}
    theirs = SwinForImageClassification(SwinConfig(id2label=labels))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    ours = load_pretrained(tmp_path)
    assert ours.architecture == "anyres_swin_tiny"
    assert ours.pretrained_cfg["label_names"] == ["cat", "dog", "owl"]
    assert ours.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = theirs(x).logits
    assert (ours(x) - expected).norm() <= 1e-5 * expected.norm()
    again = load_pretrained(ours.save_pretrained(tmp_path / "ours"))
    assert torch.equal(again(x), ours(x))
    started = as_a(Backbone, create_model("swin_tiny", num_classes=3))
    started.pretrained_cfg["label_names"] = ["cat", "dog", "owl"]
    assert TASK.load(started, tmp_path / "model.safetensors").complete
    head = started.get_parameter("head.weight")
    assert torch.equal(head, ours.get_parameter("head.weight"))
    others = as_a(Backbone, create_model("swin_tiny", num_classes=3))
    others.pretrained_cfg["label_names"] = ["ant", "bee", "fly"]
    TASK.load(others, tmp_path / "model.safetensors")
    assert not torch.equal(others.get_parameter("head.weight"), head)


def test_a_folder_of_transformers_with_another_network_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_registry, "entries", lambda: {"swin_tiny": entries()["swin_tiny"]})
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    save_file({"classifier.bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"it is a 'resnet' of transformers.* of no registered"):
        load_pretrained(tmp_path)
