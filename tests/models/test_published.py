"""The authors' weights by name: addresses, downloading them, and what is said where that is impossible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from timm.models import PretrainedCfg

from anyres.errors import UserError
from anyres.inference.modelspec import open_model, published_top1
from anyres.io.hub import model_card
from anyres.models import _published
from anyres.models._backbone import Backbone
from anyres.models._checkpoints import save_weights
from anyres.models._published import published
from anyres.models._registry import create_model, entries, model_info
from tests.typed import as_a


def config_of(name: str) -> PretrainedCfg:
    return as_a(PretrainedCfg, timm.get_pretrained_cfg(f"anyres_{name}"))


def test_every_model_has_a_line_that_agrees_with_it() -> None:
    assert published().keys() == entries().keys()
    for name, files in published().items():
        variant = entries()[name].variant
        first = files[0]
        assert first.size == max(variant.train_sizes), name
        assert first.classes == variant.args.get("num_classes", 1000), name
        assert len({file.tag for file in files}) == len(files), name
        for file in files:
            assert file.url.startswith("https://") or (not file.url and file.note), name
            config = config_of(f"{name}.{file.tag}")
            assert (config.url, config.input_size[1:]) == (file.download, (file.size, file.size))
        assert config_of(name).tag == first.tag
    addresses = [file.download for files in published().values() for file in files if file.download]
    assert len(set(addresses)) == len(addresses)


def test_most_models_can_be_downloaded() -> None:
    first = [files[0] for files in published().values()]
    assert sum(file.download is not None for file in first) == 90
    assert {file.service for file in first if file.download is None and file.url} == {"Google Drive", "Dropbox"}
    assert sum(not file.url for file in first) == 11


def test_corrected_facts() -> None:
    assert list(model_info("swin_large")["weights"]) == ["in22k_ft_in1k", "in22k"]
    assert model_info("dat_pp_base_384")["native_size"] == (384, 384)
    assert model_info("mvitv2_base_32x3")["top1"] == {224: 82.9}
    assert model_info("mvitv2_base_32x3")["benchmark"] == "Kinetics-400"
    licences = {config_of(name).license for name in entries()}
    assert licences == {"mit", "apache-2.0", "cc-by-nc-sa-4.0", "gpl-3.0", "unknown"}  # identifiers of the Hub
    card = model_card(as_a(Backbone, create_model("hatnet_tiny")).config, "image-classification")
    assert "license: unknown" in card


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resformer_small", r"on Google Drive, only for browsers: https://drive\S+; download it there and give it as "
         r"resformer_small=FILE to a command, or as checkpoint_path"),
        ("mpvit_tiny", r"on Dropbox.*reported dead"),
        ("uvit_tiny", r"never published \(.*\); if you have a file of them"),
        ("deit_tiny.in1l", r"deit_tiny has no weights 'in1l': choose deit_tiny\.in1k\."),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_downloaded_say_so_by_name(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, pretrained=True)
    if "." not in name:
        with pytest.raises(UserError, match=message):
            timm.create_model(f"anyres_{name}", pretrained=True)


def test_offline_one_sentence_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("deit_tiny", "cvt_13"):
        with pytest.raises(UserError) as caught:
            timm.create_model(f"anyres_{name}", pretrained=True, cache_dir=tmp_path)
        text = str(caught.value)
        assert published()[name][0].url in text
        assert f"{name}=FILE" in text
        assert "\n" not in text


Serve = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Serve:
    """A function that puts a state dict in the place of every download."""

    def put(state: dict[str, torch.Tensor]) -> None:
        path = tmp_path / "served.pth"
        path.unlink(missing_ok=True)
        save_weights(state, path)
        monkeypatch.setattr(_published, "fetch", lambda address, name, **_: path)

    return put


SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def test_pretrained_weights_take_heads_and_channels_as_timm_does(serve: Serve) -> None:
    model = as_a(Backbone, create_model("deit_tiny_distilled", **SMALL)).eval()
    serve(model.to_published(model.state_dict()))
    x = torch.randn(1, 3, 64, 64)
    for create, name in ((create_model, "deit_tiny_distilled"), (timm.create_model, "anyres_deit_tiny_distilled")):
        same = create(name, pretrained=True, **SMALL).eval()
        torch.testing.assert_close(same(x), model(x))
        other = as_a(Backbone, create(name, pretrained=True, num_classes=5, **SMALL)).eval()
        torch.testing.assert_close(other.forward_features(x), model.forward_features(x))
        assert other(x).shape == (1, 5)
        grey = as_a(Backbone, create(name, pretrained=True, in_chans=1, num_classes=0, **SMALL)).eval()
        torch.testing.assert_close(grey.forward_features(x[:, :1]), model.forward_features(x[:, :1].expand_as(x)))
        maps = create(name, pretrained=True, features_only=True, **SMALL).get_submodule("model").state_dict()
        assert len(maps) > 10
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in maps.items())
    with pytest.raises(UserError, match="does not fit deit_tiny_distilled"):
        create_model("deit_tiny_distilled", pretrained=True, **{**SMALL, "depth": 3})


def test_the_dense_form_takes_a_classifiers_weights(serve: Serve) -> None:
    options: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    model = as_a(Backbone, create_model("swin_tiny", **options))
    serve(model.to_published(model.state_dict()))
    dense = create_model("swin_tiny", pretrained=True, dense=True, **options)
    block = "stages.3.blocks.0.attn.qkv.weight"
    assert torch.equal(dense.get_parameter(block), model.get_parameter(block))


def test_models_open_by_name_and_only_their_own_weights_have_published_results(serve: Serve) -> None:
    model = as_a(Backbone, create_model("deit_tiny"))
    serve(model.to_published(model.state_dict()))
    name, module = open_model("deit_tiny")
    opened = as_a(Backbone, module)
    assert name == "deit_tiny"
    assert torch.equal(opened.get_parameter("head.weight"), model.get_parameter("head.weight"))
    assert published_top1("deit_tiny", opened, 1000)[224] == 72.2
    assert published_top1("deit_tiny", opened, 10) == {}
    opened.pretrained_cfg = {**opened.pretrained_cfg, "tag": "another_file"}
    assert published_top1("deit_tiny.another_file", opened, 1000) == {}


def test_timm_keeps_its_own_ways(serve: Serve, tmp_path: Path) -> None:
    """Weights that a caller of timm names are taken in place of the published ones."""
    serve({})
    model = as_a(Backbone, create_model("deit_tiny", **SMALL)).eval()
    save_weights(model.to_published(model.state_dict()), tmp_path / "mine.pth")
    by_file = timm.create_model(
        "anyres_deit_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "mine.pth")}, **SMALL
    )
    model.architecture, model.model_args = "anyres_deit_tiny", SMALL
    model.save_pretrained(tmp_path / "folder")
    by_folder = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    for other in (by_file, by_folder):
        assert torch.equal(other.get_parameter("head.weight"), model.get_parameter("head.weight"))
