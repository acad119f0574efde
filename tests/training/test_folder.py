"""What a run does to its folder: nothing to what is not its own; and where a state is damaged, it goes back to the one
before."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from anyres.data.sources import Digits
from anyres.errors import UserError
from anyres.io.files import RECORD
from anyres.training import loop, state, train
from tests.io.test_files import content
from tests.training.helpers import metrics, small_config, weights

QUICK = {"eval_every": 1, "sizes": [8], "epoch_size": 32, "ema_decay": 0.5}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(small_config(folder, **QUICK))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run; its options say another output, which a resumed run may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Starts a run that must end with a sentence before any work, and leave the folder as it was."""
    monkeypatch.setattr(loop, "build", lambda *_: pytest.fail("the work began"))

    def check(folder: Path, **changes: Any) -> str:
        before = content(folder)
        with pytest.raises(UserError) as error:
            train(small_config(folder, **{**QUICK, **changes}))
        assert content(folder) == before
        return str(error.value)

    return check


FOREIGN = [
    "best/thesis.tex",
    "last/config.json",
    "best_ema/.git/HEAD",
    "state/Ohio.txt",
    "tensorboard/events",
    *state.FILES,
]


@pytest.mark.parametrize("resume", ["auto", "no"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_project_is_not_taken_for_a_run(tmp_path: Path, refused: Callable[..., str], name: str, resume: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    sentence = refused(tmp_path, resume=resume)
    assert str(tmp_path / name.split("/")[0]) in sentence


@pytest.mark.parametrize("name", ["best", "state", "tensorboard", "config.yaml", "metrics.csv"])
def test_links_in_the_place_of_results_are_refused(tmp_path: Path, refused: Callable[..., str], name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis").write_text("mine")
    (tmp_path / name).symlink_to("elsewhere")
    refused(tmp_path)
    refused(tmp_path, resume="no")


def test_other_files_of_a_project_stay(tmp_path: Path) -> None:
    for name in ("notes.txt", "data/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for resume in ("auto", "no"):
        train(small_config(tmp_path, resume=resume, **QUICK))
        assert {(tmp_path / name).read_text() for name in ("notes.txt", "data/a.png")} == {"mine"}


def test_resume_no_removes_what_the_run_wrote_and_nothing_else(run: Path) -> None:
    for name in ("tensorboard/anyres/notes.txt", "tensorboard/other/events.out.tfevents.1", "state/notes.txt"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    before = {path: value for path, value in content(run).items() if value == b"mine"}
    logs = set((run / "tensorboard" / "anyres").glob("events*"))
    state.clear_run(run)
    left = content(run)
    assert {path: value for path, value in left.items() if value == b"mine"} == before
    assert not any(path.exists() for path in logs)
    assert {path.split("/")[0] for path in left} == {RECORD, "config.yaml", "tensorboard", "state"}
    assert train(small_config(run, resume="no", **QUICK)).status == "finished"


@pytest.mark.parametrize("name", ["best/README.md", "last_ema/config.json", "best/model.safetensors", "metrics.csv"])
@pytest.mark.parametrize("resume", ["auto", "no"])
def test_results_that_somebody_changed_are_kept(run: Path, refused: Callable[..., str], name: str, resume: str) -> None:
    with (run / name).open("a") as file:
        file.write("my own finding")
    assert Path(name).name in refused(run, resume=resume)


def test_a_file_that_came_into_best_during_the_run_stops_it_and_no_work_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    original = loop.validate

    def add(run: Any, model: Any, prefix: str) -> Any:
        (tmp_path / "best").mkdir(exist_ok=True)
        (tmp_path / "best" / "notes.txt").write_text("mine")
        return original(run, model, prefix)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", add)
        with pytest.raises(UserError, match=r"best holds notes\.txt"):
            train(small_config(tmp_path, **QUICK))
    (tmp_path / "best" / "notes.txt").rename(tmp_path / "notes.txt")
    train(small_config(tmp_path, **QUICK))
    assert weights(tmp_path / "best") == weights(finished / "best")
    assert metrics(tmp_path) == metrics(finished)


def test_an_edited_recipe_in_the_run_folder_is_what_the_run_does_and_stays(tmp_path: Path) -> None:
    train(small_config(tmp_path, **QUICK))
    options = yaml.safe_load((tmp_path / "config.yaml").read_text())
    text = "# tried on Monday\n" + yaml.safe_dump({**options, "early_stop": 7})
    (tmp_path / "config.yaml").write_text(text)
    train(small_config(tmp_path, **QUICK, early_stop=7))
    assert (tmp_path / "config.yaml").read_text() == text
    with pytest.raises(UserError, match=r"config\.yaml exists"):
        train(small_config(tmp_path, **QUICK, early_stop=8))


def test_a_run_of_version_0_1_is_continued(run: Path) -> None:
    for record in run.rglob(RECORD):
        record.unlink()
    before = weights(run / "best")
    assert train(small_config(run, **QUICK)).status == "finished"
    assert weights(run / "best") == before
    assert train(small_config(run, resume="no", **QUICK)).status == "finished"


def test_the_folder_of_the_data_and_weights_that_would_go_are_no_output(
    run: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "link").symlink_to("data")
    assert "is the folder of data" in refused(tmp_path / "data", data=str(tmp_path / "link"))
    assert "is the folder of val_data" in refused(tmp_path / "data", val_data=str(tmp_path / "data"))
    assert "would remove init_from" in refused(run, init_from=str(run), resume="no")
    assert "would remove teacher" in refused(run, teacher=str(run / "best"), resume="no")


def test_two_runs_in_one_folder_are_told_of_each_other(run: Path, refused: Callable[..., str]) -> None:
    from anyres.io.files import locked

    with locked(run):
        assert f"is in use by process {os.getpid()} on" in refused(run)


# States that cannot be used -------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\x80\x02}q\x00(\x8a\xff." * 1000)


def flip(path: Path) -> None:
    """One bit in the middle of a tensor, which torch would read without a word."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def change(**parts: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for name, part in parts.items():
            saved[name] = part(saved[name])
        torch.save(saved, path)
        (path.parent / RECORD).unlink()  # as if version 0.1 had written it: only its structure tells

    return write


def other_structure(value: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save(value, path)
        (path.parent / RECORD).unlink()

    return write


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "empty": empty,
    "garbage": garbage,
    "flipped": flip,
    "gone": remove,
    "a list": other_structure([1, 2]),
    "a tensor": other_structure(torch.zeros(3)),
    "no position": other_structure({"model": {}}),
    "position": change(position=lambda _: 7),
    "unknown field": change(position=lambda saved: {**saved, "epcoh": 1}),
    "epoch of text": change(position=lambda saved: {**saved, "epoch": "1"}),
    "epoch without row": change(position=lambda saved: {**saved, "epoch": 9}),
    "batch beyond": change(position=lambda saved: {**saved, "batch": 1000}),
    "identity": change(identity=lambda _: None),
    "model": change(model=lambda saved: dict(list(saved.items())[1:])),
    "model's shape": change(model=lambda saved: {name: value.flatten()[:1] for name, value in saved.items()}),
    "model of None": change(model=lambda _: None),
    "optimizer": change(optimizer=lambda saved: {**saved, "param_groups": saved["param_groups"][:1]}),
    "empty optimizer": change(optimizer=lambda _: {}),
    "average": change(ema=lambda _: None),
    "ranks": change(ranks=lambda _: [{}]),
    "no ranks": change(ranks=lambda _: []),
    "sums": change(ranks=lambda saved: [{**saved[0], "sums": {"loss_8": 1}}]),
    "generators": change(ranks=lambda saved: [{**saved[0], "rng": {**saved[0]["rng"], "torch": torch.zeros(3)}}]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_gives_way_to_the_one_before(
    run: Path, finished: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on from the older state and ends with the same weights."""
    newest, older = state.saved_states(run)
    assert state.load_state(older)[0].updates == state.load_state(newest)[0].updates
    DAMAGE[damage](newest / state.STATE_FILE)
    validations: list[Any] = []
    original = loop.validate

    def validate(*given: Any) -> Any:
        validations.append(given)
        return original(*given)

    monkeypatch.setattr(loop, "validate", validate)
    with caplog.at_level(logging.WARNING):
        assert train(small_config(run, **QUICK)).status == "finished"
    assert len(validations) == 2  # of the weights and their average, for the last epoch alone
    assert damage == "gone" or f"{newest} cannot be used" in caplog.text
    assert weights(run / "best") == weights(finished / "best")
    assert metrics(run) == metrics(finished)


@pytest.mark.parametrize("names", ["0123456798", "0123456x89"])
def test_a_run_goes_on_with_its_own_classes(run: Path, monkeypatch: pytest.MonkeyPatch, names: str) -> None:
    """As many are not enough: the same in another order are others. What was saved without their names goes on."""
    original = Digits.__init__

    def renamed(self: Digits, *given: Any) -> None:
        original(self, *given)
        self.label_names = list(names)

    monkeypatch.setattr(Digits, "__init__", renamed)
    place = next(place for place, name in enumerate(names) if name != str(place))
    with pytest.raises(UserError, match=f"was started with class {place} {place} and now it is {names[place]};"):
        train(small_config(run, **QUICK))
    without = change(identity=lambda saved: {key: saved[key] for key in saved if not key.startswith("class ")})
    for path in state.saved_states(run):
        without(path / state.STATE_FILE)
    assert train(small_config(run, **QUICK)).status == "finished"


def test_only_damaged_states_is_an_error(run: Path) -> None:
    for path in state.saved_states(run):
        empty(path / state.STATE_FILE)
    with pytest.raises(UserError, match=r"no state in .* can be used"):
        train(small_config(run, **QUICK))


def test_a_run_is_said_to_be_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(small_config(tmp_path, **QUICK))
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "running"
    monkeypatch.undo()
    assert train(small_config(tmp_path, **QUICK)).status == "finished"
