"""What is written to disk, what a kill leaves, and what happens when nothing can be written."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from anyres.errors import UserError
from anyres.training import state
from anyres.training.state import Position


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
    assert state.load_state(tmp_path) is None
    for updates in (5, 9, 110):
        save(tmp_path, updates)
    assert len(state.saved_states(tmp_path)) == 2
    found = state.load_state(tmp_path)
    assert found is not None
    position, content = found
    assert (position.updates, position.epoch, position.rows) == (110, 11, [{"epoch": 1, "loss": 0.5}])
    assert position.bad == {"a.png": "empty"}
    assert content["model"]["w"].tolist() == [110, 110]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "gone"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    file = state.saved_states(tmp_path)[0] / state.STATE_FILE
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"hello", "gone": b""}[damage])
    if damage == "gone":
        file.unlink()
    found = state.load_state(tmp_path)
    assert found is not None
    assert found[0].updates == 1


def test_only_damaged_states_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (state.saved_states(tmp_path)[0] / state.STATE_FILE).write_bytes(b"")
    with pytest.raises(UserError, match=r"no state in .* can be read"):
        state.load_state(tmp_path)


def test_what_killed_saves_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in ("state/.step_000000002_000000.ab.tmp", ".best.xy.tmp", ".last_ema.xy.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    for name in (".metrics.xy.tmp.csv", ".summary.xy.tmp.json", ".config.xy.tmp.yaml"):
        (tmp_path / name).touch()
    (tmp_path / ".last.old").mkdir()  # a kill between the two renames of a replacement
    (tmp_path / ".notes").touch()
    state.prepare_folder(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"state", "state/step_000000001_000000", "state/step_000000001_000000/state.pt", "last", ".notes"}


def test_metrics_rows_may_have_different_columns(tmp_path: Path) -> None:
    state.write_metrics(tmp_path, [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "acc1": 90.0}])
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["epoch,loss,acc1", "1,0.5,", "2,0.25,90.0"]


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
    monkeypatch.setattr(state, "_is_full", lambda path: True)
    with pytest.raises(UserError, match="the disk is full"):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_000000001_000000"]


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), state.explained(tmp_path):
        raise RuntimeError("a bug")
