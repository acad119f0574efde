"""What is written to disk, what a kill leaves, and what happens when nothing can be written."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyres.errors import UserError
from anyres.io import files
from anyres.io.files import locked
from anyres.models._registry import create_model
from anyres.models.resformer import ResFormer
from anyres.training import state
from anyres.training.state import Position
from tests.typed import as_a


def test_generators_continue_where_they_were_saved(tmp_path: Path) -> None:
    np.random.standard_normal(3)  # an odd number leaves a second Gaussian value waiting
    torch.save(state.rng_state(), tmp_path / "rng.pt")
    expected = [random.random(), np.random.standard_normal(), float(torch.rand(()))]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    state.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [random.random(), np.random.standard_normal(), float(torch.rand(()))] == expected


def save(folder: Path, updates: int, keep: int = 2) -> None:
    position = Position(epoch=updates // 10, updates=updates, rows=[{"epoch": 1, "loss": 0.5}], bad={"a.png": "empty"})
    state.save_state(folder, position, {"model": {"w": torch.full((2,), float(updates))}}, keep)


def test_newest_state_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    for updates in (5, 9, 110):
        save(tmp_path, updates)
    assert len(state.saved_states(tmp_path)) == 2
    position, content = state.load_state(state.saved_states(tmp_path)[0])
    assert (position.updates, position.epoch, position.rows) == (110, 11, [{"epoch": 1, "loss": 0.5}])
    assert position.bad == {"a.png": "empty"}
    assert content["model"]["w"].tolist() == [110, 110]


def test_what_killed_saves_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    foreign = [".notes", ".best.copy.tmp", "state/.step_000000002_000000.ab.tmp", ".anyres-draft.tmp"]
    for name in ("state/.anyres-0ab_cd12.tmp", ".anyres-abcdefgh.tmp", *foreign):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / ".anyres-12345678.tmp.csv").touch()
    as_a(ResFormer, create_model("resformer_tiny", depth=1)).save_pretrained(tmp_path / "last")
    (tmp_path / "last").rename(tmp_path / ".last.old")  # a kill between the two renames of a replacement
    with locked(tmp_path):
        state.prepare_folder(tmp_path)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*")}
    assert found == {"state", "last", *(name for name in foreign if "/" not in name)}
    assert {path.name for path in (tmp_path / "state").iterdir()} == {
        "step_000000001_000000",
        ".step_000000002_000000.ab.tmp",
    }


def test_other_files_beside_states_stay(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (state.saved_states(tmp_path)[0] / "notes.txt").write_text("the good one")
    (tmp_path / "state" / "step_of_mine").mkdir()
    (tmp_path / "state" / "step_of_mine" / "state.pt").write_text("mine")
    for updates in (2, 3, 4):
        save(tmp_path, updates)
    state.clear_run(tmp_path)
    left = {path.relative_to(tmp_path / "state").as_posix() for path in (tmp_path / "state").rglob("*.*")}
    assert left == {"step_000000001_000000/notes.txt", "step_of_mine/state.pt"}


def test_a_state_newer_than_the_run_counts_for_nothing(tmp_path: Path) -> None:
    """After a fall-back to an older state, the newer one, which could not be read, is in the way of none."""
    save(tmp_path, 9)
    (state.saved_states(tmp_path)[0] / state.STATE_FILE).write_bytes(b"damaged")
    for updates in (5, 6, 7):
        save(tmp_path, updates)
    assert [path.name[5:14] for path in state.saved_states(tmp_path)] == ["000000009", "000000007", "000000006"]
    save(tmp_path, 9)
    assert state.load_state(state.saved_states(tmp_path)[0])[0].updates == 9


def test_metrics_rows_may_have_different_columns(tmp_path: Path) -> None:
    state.write_metrics(tmp_path, [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "top1": 90.0}])
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["epoch,loss,top1", "1,0.5,", "2,0.25,90.0"]


def test_a_folder_that_cannot_be_written_gets_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/run: Not a directory"):
        state.prepare_folder(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_a_full_disk_gets_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    save(tmp_path, 1)
    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(files, "_is_full", lambda path: True)
    with pytest.raises(UserError, match="the disk is full"):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_000000001_000000"]


def test_a_limit_on_the_size_of_files_gets_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"size of files \(ulimit -f\)"):
        save(tmp_path, 1)
    assert not any((tmp_path / "state").iterdir())


@pytest.mark.parametrize(
    ("name", "fused"), [("adamw", True), ("sgd", True), ("adamw", False), ("adafactor", False), ("lamb", False)]
)
def test_what_an_optimiser_remembers_is_looked_at(name: str, fused: bool) -> None:
    """A value that cannot be would end the first step after the resume, when the state before is out of reach."""
    from timm.optim import create_optimizer_v2

    from anyres.training.resume import check_moments

    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 40))
    options: Any = {"fused": True} if fused else {}
    optimizer = create_optimizer_v2(network, name, lr=0.1, momentum=0.9, **options)
    network(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    check_moments(optimizer)
    remembered = optimizer.state[next(network.parameters())]
    first = next(key for key, value in remembered.items() if isinstance(value, torch.Tensor))
    whole = remembered[first]
    for damage in ("x", [whole]):
        remembered[first] = damage
        with pytest.raises(ValueError, match=rf"for {first} of a parameter"):
            check_moments(optimizer)
    remembered[first] = whole
    shaped = [key for key, value in remembered.items() if isinstance(value, torch.Tensor) and value.dim() == 2]
    for key in shaped:
        moment = remembered[key]
        for misshapen in (moment.flatten()[:1], moment.new_zeros(()), torch.cat([moment, moment])):
            remembered[key] = misshapen
            with pytest.raises(ValueError, match=f"has a {key} of another shape"):
                check_moments(optimizer)
        remembered[key] = moment
    assert shaped
    del remembered[first]
    with pytest.raises(ValueError, match="different entries for parameters of the same shape"):
        check_moments(optimizer)
