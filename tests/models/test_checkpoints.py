"""Reading weights files that people bring, good and bad."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from anyres.errors import UserError
from anyres.models._checkpoints import load_checkpoint, read_state, save_weights
from anyres.models._registry import create_model, guess_model
from anyres.models.deit import DeiT
from tests.typed import as_a

SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5, "img_size": 64}


@pytest.fixture
def model() -> DeiT:
    torch.manual_seed(1)
    return as_a(DeiT, create_model("deit_tiny", **SMALL))


def fresh(**options: Any) -> DeiT:
    torch.manual_seed(2)
    return as_a(DeiT, create_model("deit_tiny", **{**SMALL, **options}))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


NESTS = {
    "flat": lambda state: state,
    "model": lambda state: {"model": state, "args": argparse.Namespace(lr=1.0), "epoch": 3},
    "state_dict": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    "compiled": lambda state: {"model": {f"_orig_mod.module.{k}": v for k, v in state.items()}},
    "encoder": lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("names", ["published", "ours"])
def test_nested_and_prefixed_files_load(model: DeiT, tmp_path: Path, nest: str, names: str) -> None:
    state = model.state_dict()
    if names == "published":
        state = model.to_published(state)
        assert "pos_embed" in state
    torch.save(NESTS[nest](state), tmp_path / "x.pth")
    other = fresh()
    assert not same(other, model)
    assert load_checkpoint(other, tmp_path / "x.pth").complete
    assert same(other, model)


def test_safetensors_and_moving_average(model: DeiT, tmp_path: Path) -> None:
    save_file(model.to_published(model.state_dict()), tmp_path / "x.safetensors")
    other = fresh()
    assert load_checkpoint(other, tmp_path / "x.safetensors").complete
    assert same(other, model)
    torch.save({"model": fresh().state_dict(), "model_ema": model.state_dict()}, tmp_path / "y.pth")
    other = fresh(num_classes=5)
    load_checkpoint(other, tmp_path / "y.pth", ema=True)
    assert same(other, model)


def test_round_trip_to_the_published_layout(model: DeiT, tmp_path: Path) -> None:
    for suffix in (".pth", ".safetensors"):
        save_weights(model.to_published(model.state_dict()), tmp_path / f"x{suffix}")
        other = fresh()
        assert load_checkpoint(other, tmp_path / f"x{suffix}").complete
        assert same(other, model)


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_saved_files_have_the_modes_of_others(model: DeiT, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path / "model")
        save_weights(model.state_dict(), tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    files = [tmp_path / "x.safetensors", *(tmp_path / "model").iterdir()]
    assert {file.name: file.stat().st_mode & 0o777 for file in files} == {file.name: 0o640 for file in files}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750


def test_another_head_is_named_and_can_be_left_out(model: DeiT, tmp_path: Path) -> None:
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    other = fresh(num_classes=3)
    before = as_a(torch.nn.Linear, other.head).weight.clone()
    with pytest.raises(UserError, match=r"head\.weight \(5, 48\) for \(3, 48\).*num_classes"):
        load_checkpoint(other, tmp_path / "x.pth")
    report = load_checkpoint(other, tmp_path / "x.pth", strict=False)
    assert len(report.mismatched) == 2
    assert torch.equal(as_a(torch.nn.Linear, other.head).weight, before)
    assert torch.equal(other.get_parameter("cls_token"), model.get_parameter("cls_token"))


def test_position_table_of_another_native_size_is_resized(model: DeiT, tmp_path: Path) -> None:
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    other = fresh(img_size=(96, 64))
    report = load_checkpoint(other, tmp_path / "x.pth")
    assert report.resized == ["position.table"]
    assert model.position is not None
    torch.testing.assert_close(other.get_parameter("position.table"), model.position((6, 4)))


def test_weights_of_another_model_leave_this_one_alone(model: DeiT, tmp_path: Path) -> None:
    torch.save({"model": create_model("resformer_tiny", **SMALL).state_dict()}, tmp_path / "x.pth")
    other = fresh()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(UserError, match=r"does not fit deit_tiny .*without a place"):
        load_checkpoint(other, tmp_path / "x.pth")
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


def test_what_asks_for_code_is_left_out_and_named(model: DeiT, tmp_path: Path) -> None:
    torch.save({"model": model.state_dict(), "evil": Evil()}, tmp_path / "x.pth")
    report = load_checkpoint(fresh(), tmp_path / "x.pth")
    assert report.complete
    assert report.foreign == [f"{os.name}.system"]
    torch.save({"model": Evil(), "epoch": 3}, tmp_path / "y.pth")
    with pytest.raises(UserError, match=r"holds no weights, but objects of \w+\.system"):
        read_state(tmp_path / "y.pth")
    (tmp_path / "z.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"holds no weights, but objects of \w+\.system"):
        read_state(tmp_path / "z.pth")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 broken", b"\x80\x04K\x01."], ids=repr)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_weights(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        read_state(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights file"):
        read_state(tmp_path / "none.pth")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_one_sentence(tmp_path: Path, data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from([".pth", ".safetensors"]))
    path = tmp_path / f"whole{suffix}"
    save_weights({"a.weight": torch.ones(3, 2), "b": torch.zeros(4)}, path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    bad = tmp_path / f"bad{suffix}"
    bad.write_bytes(content)
    with contextlib.suppress(UserError):  # a flipped bit in a number cannot be noticed; any other error is a bug
        read_state(bad)


def test_the_model_of_a_file_is_recognised(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = create_model("deit_tiny_distilled").state_dict()
    state = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
    save_weights(DeiT.to_published(state), tmp_path / "x.pth")
    assert guess_model(tmp_path / "x.pth") == "deit_tiny_distilled"
    save_weights({"position.table": torch.zeros(1, 2, 3)}, tmp_path / "y.pth")
    with pytest.raises(UserError, match="fits no registered model"):
        guess_model(tmp_path / "y.pth")


def test_a_classifier_file_fits_the_dense_form_but_for_its_norms(tmp_path: Path) -> None:
    options: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    save_weights(create_model("swin_tiny", **options).state_dict(), tmp_path / "whole.pth")
    report = load_checkpoint(create_model("swin_tiny", dense=True, **options), tmp_path / "whole.pth", strict=False)
    assert not report.unexpected
    assert all(name.startswith("out_norms.") for name in report.missing)
    pcpvt: dict[str, Any] = {"embed_dims": (16, 16, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    save_weights(create_model("twins_pcpvt_small", **pcpvt).state_dict(), tmp_path / "twins.pth")
    load_checkpoint(create_model("twins_pcpvt_small", dense=True, **pcpvt), tmp_path / "twins.pth")
