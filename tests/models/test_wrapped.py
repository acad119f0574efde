"""Weights inside the files of training runs: under names that wrappers left, averaged beside raw ones, in parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from anyres.cli.commands.convert import convert
from anyres.errors import UserError
from anyres.inference.modelspec import open_model
from anyres.models._backbone import Backbone
from anyres.models._checkpoints import KINDS, load_checkpoint
from anyres.models._registry import create_model
from anyres.tasks.classification import TASK
from anyres.training import load_config
from tests.typed import as_a

SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5, "img_size": 64}
WRAPPERS: dict[str, Callable[[str], str]] = {
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace("blocks.0", "blocks.0._fsdp_wrapped_module"),
    "checkpointing": lambda name: name.replace("blocks.1", "blocks.1._checkpoint_wrapped_module"),
    "compiled blocks": lambda name: f"module.{name}".replace("blocks.0", "blocks.0._orig_mod"),
    "Fabric": lambda name: f"_forward_module.{name}",
    "Lightning": lambda name: f"net.{name}",
}


@pytest.fixture
def model() -> Backbone:
    torch.manual_seed(1)
    return as_a(Backbone, create_model("deit_tiny", **SMALL))


def fresh() -> Backbone:
    torch.manual_seed(2)
    return as_a(Backbone, create_model("deit_tiny", **SMALL))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_that_wrappers_left(model: Backbone, tmp_path: Path, wrapper: str) -> None:
    state = {WRAPPERS[wrapper](name): tensor for name, tensor in model.to_published(model.state_dict()).items()}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    other = fresh()
    assert load_checkpoint(other, tmp_path / "x.ckpt").complete
    assert same(other, model)


def test_deepspeed(model: Backbone, tmp_path: Path) -> None:
    content = {"module": model.state_dict(), "optimizer": None, "ds_config": {}, "dp_world_size": 2}
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    other = fresh()
    assert load_checkpoint(other, tmp_path / "mp_rank_00_model_states.pt").complete
    assert same(other, model)


def test_checkpoints_in_parts_say_how_to_join_them(model: Backbone, tmp_path: Path) -> None:
    for name, command in (("__0_0.distcp", "dcp_to_torch"), ("zero_to_fp32.py", "zero_to_fp32.py")):
        folder = tmp_path / name.partition(".")[2]
        folder.mkdir()
        (folder / name).touch()
        for opened in (lambda folder: load_checkpoint(model, folder), lambda folder: open_model(str(folder))):
            with pytest.raises(UserError, match=rf"in parts: join it with `python .*{command}"):
                opened(folder)


AVERAGES: dict[str, Callable[[Any, Any], Any]] = {
    "timm": lambda raw, mean: {"state_dict": raw, "state_dict_ema": mean},
    "deit": lambda raw, mean: {"model": raw, "model_ema": mean, "epoch": 3},
    "teacher": lambda raw, mean: {"student": raw, "teacher": {f"backbone.{key}": value for key, value in mean.items()}},
    "nested": lambda raw, mean: {"model": {"state_dict": raw, "ema": {"module": mean}}},
    "swa": lambda raw, mean: {
        "model": raw,
        "ema": {"n_averaged": torch.tensor(3), **{f"module.{key}": value for key, value in mean.items()}},
    },
}


@pytest.mark.parametrize("layout", AVERAGES)
def test_averages_beside_raw_weights_are_a_choice(model: Backbone, tmp_path: Path, layout: str) -> None:
    mean = fresh()
    torch.save(AVERAGES[layout](model.state_dict(), mean.state_dict()), tmp_path / "both.pth")
    for ema, expected in ((True, mean), (False, model), (None, model)):
        other = as_a(Backbone, create_model("deit_tiny", **SMALL))
        report = load_checkpoint(other, tmp_path / "both.pth", ema=ema)
        assert same(other, expected)
        assert report.has_both
        assert report.averaged == (ema is True)
        assert ("averaged weights (not its raw ones)" in str(report)) == (ema is True)


def test_the_choice_on_the_command_line_and_in_training(tmp_path: Path) -> None:
    raw, mean = (as_a(Backbone, create_model("deit_tiny")) for _ in range(2))
    torch.save({"model": raw.state_dict(), "model_ema": mean.state_dict()}, tmp_path / "both.pth")
    choices: list[tuple[Literal["auto", "raw", "averaged"], Backbone]]
    choices = [("auto", raw), ("raw", raw), ("averaged", mean)]
    for weights, expected in choices:
        convert(str(tmp_path / "both.pth"), str(tmp_path / "out.safetensors"), model="deit_tiny", weights=weights)
        assert torch.equal(
            load_file(tmp_path / "out.safetensors")["head.weight"], expected.get_parameter("head.weight")
        )
        started = create_model("deit_tiny")
        TASK.load(started, tmp_path / "both.pth", KINDS[load_config(None, init_weights=weights).init_weights])
        assert same(started, expected)


@pytest.mark.parametrize("nest", ["model_ema", "state_dict_ema", "teacher"])
def test_averages_alone_are_taken(model: Backbone, tmp_path: Path, nest: str) -> None:
    torch.save({nest: model.state_dict(), "model": None}, tmp_path / "mean.pth")
    other = fresh()
    report = load_checkpoint(other, tmp_path / "mean.pth")
    assert same(other, model)
    assert report.averaged
    assert not report.has_both


def test_models_whose_results_are_those_of_averages_take_them(tmp_path: Path) -> None:
    args: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)}
    raw, mean, other = (create_model("cswin_tiny", **args) for _ in range(3))
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": mean.state_dict()}, tmp_path / "x.pth")
    assert load_checkpoint(other, tmp_path / "x.pth").averaged
    assert same(other, mean)


def test_timm_loads_any_layout_as_checkpoint_path(model: Backbone, tmp_path: Path) -> None:
    torch.save({"model": model.to_published(model.state_dict())}, tmp_path / "published.pth")
    assert same(timm.create_model("anyres_deit_tiny", checkpoint_path=tmp_path / "published.pth", **SMALL), model)
    args: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 6), "num_classes": 5}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", **args)
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    ours = timm.create_model("anyres_swin_tiny", checkpoint_path=tmp_path / "timm.safetensors", **args)
    weight = "downsample.reduction.weight"
    assert torch.equal(ours.get_parameter(f"stages.2.{weight}"), theirs.get_parameter(f"layers.2.{weight}"))
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model("anyres_deit_tiny", checkpoint_path=tmp_path / "timm.safetensors", **SMALL)


def test_the_report_says_what_a_person_can_act_on(model: Backbone, tmp_path: Path) -> None:
    state = model.state_dict() | {"extra.weight": torch.zeros(2)}
    del state["norm.weight"]
    torch.save({"model": state}, tmp_path / "x.pth")
    report = load_checkpoint(create_model("deit_tiny", **{**SMALL, "num_classes": 3}), tmp_path / "x.pth", strict=False)
    count = len(model.state_dict())
    assert str(report) == (
        f"{count - 3} of {count} tensors loaded from its weights; 1 missing from the file: norm.weight; 2 of another "
        "shape in the file: head.weight (5, 48) for (3, 48), head.bias (5,) for (3,); 1 of the file without a place in "
        "the model: extra.weight"
    )
