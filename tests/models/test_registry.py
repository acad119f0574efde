"""Names, options and errors of the one door to the models."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import anyres
from anyres.errors import UserError
from anyres.models._registry import create_model, entries, list_models, model_info, resolve_name
from anyres.models.deit import DeiT
from anyres.models.resformer import ResFormer
from tests.typed import as_a


def test_every_promised_name_is_there() -> None:
    names = "resformer_tiny resformer_small resformer_base deit_tiny deit_small deit_base deit_tiny_distilled "
    names += "deit_small_distilled deit_base_distilled deit_base_384 deit_base_distilled_384"
    assert set(names.split()) <= set(list_models())
    assert list_models("deit_*_384") == ["deit_base_384", "deit_base_distilled_384"]
    assert list_models("distilled") == [name for name in list_models() if "distilled" in name]


def test_published_and_prefixed_names_resolve() -> None:
    assert resolve_name("deit_tiny_patch16_224") == "deit_tiny"
    assert resolve_name("anyres_resformer_base") == "resformer_base"


@pytest.mark.parametrize(("wrong", "near"), [("resformer_smal", "resformer_small"), ("deit_tinny", "deit_tiny")])
def test_unknown_name_offers_a_near_one(wrong: str, near: str) -> None:
    with pytest.raises(UserError, match=near):
        create_model(wrong)


def test_no_model_takes_a_name_of_timm() -> None:
    ours = {f"anyres_{name}" for name in list_models()}
    assert ours <= set(timm.list_models("anyres_*"))
    assert timm.create_model("deit_tiny_patch16_224").__class__.__module__.startswith("timm")


def test_published_parameter_counts() -> None:
    counts = {"deit_base_384": 86.86, "deit_base_distilled_384": 87.63, "resformer_base": 86.43, "deit_base": 86.57}
    for name, millions in counts.items():
        assert model_info(name)["parameters"] / 1e6 == pytest.approx(millions, abs=0.005)


def test_every_variant_states_its_facts() -> None:
    for name, (family, variant) in entries().items():
        info = model_info(name)
        assert info["top1"].get(max(variant.train_sizes), 0) > 60 or info["notes"], name
        assert all(60 < top1 < 90 for size, top1 in info["top1"].items() if size in variant.train_sizes), name
        assert family.paper
        assert family.licence
        assert info["size_policy"].endswith(".")


def test_options_reach_the_model_and_none_means_default() -> None:
    model = create_model("resformer_tiny", num_classes=5, in_chans=4, depth=2, embed_dim=None, drop_path_rate=0.1)
    assert model.embed_dim == 192
    assert model(torch.randn(1, 4, 32, 48)).shape == (1, 5)
    assert create_model("deit_tiny", depth=1, dynamic_img_size=True)(torch.randn(1, 3, 40, 64)).shape == (1, 1000)


def test_checkpoint_path(tmp_path: Path) -> None:
    model = as_a(DeiT, create_model("deit_tiny", depth=1))
    torch.save({"model": model.to_published(model.state_dict())}, tmp_path / "x.pth")
    loaded = create_model("deit_tiny", depth=1, checkpoint_path=tmp_path / "x.pth")
    assert torch.equal(loaded.get_parameter("head.weight"), model.get_parameter("head.weight"))


def test_push_to_hub_sends_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub itself cannot be reached in a test: what would be sent is looked at instead."""
    import huggingface_hub

    sent: dict[str, list[str]] = {}

    class FakeApi:
        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> str:
            return f"address of {repository}"

        def file_exists(self, repository: str, name: str) -> bool:
            return repository == "me/edited"

        def upload_folder(self, folder_path: Path, repo_id: str, allow_patterns: list[str]) -> None:
            sent[repo_id] = sorted(path.name for path in folder_path.iterdir() if path.name in allow_patterns)

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    model = as_a(ResFormer, create_model("resformer_tiny", depth=1))
    assert model.push_to_hub("me/mine") == "address of me/mine"
    assert sent == {"me/mine": ["README.md", "config.json", "model.safetensors"]}
    model.push_to_hub("me/edited")
    assert sent["me/edited"] == ["config.json", "model.safetensors"]  # the model card there stays


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    model = as_a(ResFormer, create_model("resformer_tiny", depth=1, num_classes=3))
    model.save_pretrained(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **_: str(tmp_path / "snapshot"))
    loaded = anyres.load_pretrained("hf-hub:me/mine@v1")
    assert torch.equal(loaded.get_parameter("head.weight"), model.get_parameter("head.weight"))


def test_damaged_folder_is_one_sentence(tmp_path: Path) -> None:
    as_a(ResFormer, create_model("resformer_tiny", depth=1)).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        anyres.load_pretrained(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        anyres.load_pretrained(tmp_path)


def test_names_are_found_in_other_spellings() -> None:
    assert resolve_name("HAT_Net_tiny") == "hatnet_tiny"
    assert resolve_name("CSWin_64_12211_tiny_224") == "cswin_tiny"
    letters = [name.replace("_", "") for name in entries()]
    assert len(set(letters)) == len(letters)
