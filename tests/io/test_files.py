"""What is written appears whole or not at all, and replaces nothing that anyres did not write.

One file, though long: a list of ways to lose somebody's work, short each.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import anyres
from anyres.cli.main import main
from anyres.errors import UserError
from anyres.io import files, hub
from anyres.io.files import LOCK, RECORD, atomic_folder, atomic_write, existing, locked
from anyres.models._registry import create_model
from anyres.models.deit import DeiT
from anyres.models.resformer import ResFormer
from tests.typed import as_a


def content(folder: Path) -> dict[str, str | bytes]:
    """Everything below a folder: files with what is in them, links with where they lead. Not who holds it now."""
    found: dict[str, str | bytes] = {}
    for path in folder.rglob("*"):
        if path.name != LOCK:
            place = str(path.relative_to(folder))
            found[place] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
    return found


def write(path: Path, text: str, kind: str = "sweep") -> None:
    with atomic_write(path, kind) as temporary:
        temporary.write_text(text)


def write_folder(path: Path, text: str) -> None:
    with atomic_folder(path, "model", ["a", "b"]) as temporary:
        for name in "ab":
            (temporary / name).write_text(text)


# Single files ---------------------------------------------------------------------------------------------------------


def test_own_files_are_replaced_and_edited_ones_are_not(tmp_path: Path) -> None:
    target = tmp_path / "new" / "täble.csv"
    for text in ("one", "two", "one"):
        write(target, text)
    assert target.read_text() == "one"
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~files._umask()
    target.write_text("corrected by hand")
    with pytest.raises(UserError, match=r"täble.csv exists, and it is not a sweep file as anyres wrote it"):
        write(target, "three")
    assert {path.name for path in target.parent.iterdir()} == {RECORD, target.name}
    assert target.read_text() == "corrected by hand"


def test_one_kind_of_output_does_not_replace_another(tmp_path: Path) -> None:
    write(tmp_path / "x.csv", "one")
    with pytest.raises(UserError, match="not a predictions file"):
        write(tmp_path / "x.csv", "two", kind="predictions")


def test_an_empty_file_has_nothing_to_lose(tmp_path: Path) -> None:
    (tmp_path / "x.csv").touch()  # as mktemp makes one
    write(tmp_path / "x.csv", "one")
    assert (tmp_path / "x.csv").read_text() == "one"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "x.csv", "one")
    before = content(tmp_path)
    with pytest.raises(RuntimeError, match="a bug"), atomic_write(tmp_path / "x.csv", "sweep"):
        raise RuntimeError("a bug")
    assert content(tmp_path) == before


def test_a_kill_before_the_rename_leaves_a_file_that_is_still_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x.csv", "one")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "x.csv", "two")
    assert (tmp_path / "x.csv").read_text() == "one"
    write(tmp_path / "x.csv", "three")


def test_a_torn_line_of_the_record_hides_no_other(tmp_path: Path) -> None:
    write(tmp_path / "x.csv", "one")
    with (tmp_path / RECORD).open("a") as record:
        record.write('{"file": "y.csv", "ki')
    write(tmp_path / "y.csv", "two")
    for name in ("x.csv", "y.csv"):
        write(tmp_path / name, "again")


def test_links_are_followed_and_what_they_lead_to_is_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "to_mine").symlink_to("thesis")
    (tmp_path / "to_nothing").symlink_to("target")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("to_mine", "circle"):
        with pytest.raises(UserError):
            write(tmp_path / name, "one")
    for text in ("one", "two"):
        write(tmp_path / "to_nothing", text)
    assert (tmp_path / "target").read_text() == "two"
    assert (tmp_path / "to_nothing").is_symlink()
    assert (tmp_path / "thesis").read_text() == "mine"


def test_the_other_name_of_a_replaced_file_keeps_what_it_held(tmp_path: Path) -> None:
    write(tmp_path / "x.csv", "one")
    os.link(tmp_path / "x.csv", tmp_path / "copy.csv")
    write(tmp_path / "x.csv", "two")
    assert (tmp_path / "copy.csv").read_text() == "one"


def test_what_is_no_file_is_written_to_or_refused_but_never_replaced(tmp_path: Path) -> None:
    write(Path(os.devnull), "nothing")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    pipe, received = tmp_path / "pipe.csv", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    write(pipe, "through")
    reader.join()
    assert received == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder exists"):
        write(tmp_path / "folder", "one")
    if Path("/dev/full").exists():
        with pytest.raises(UserError, match="cannot write /dev/full: the disk is full"):
            write(Path("/dev/full"), "one")
        assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.parametrize("name", ["file/x.csv", "n" * 300, f"{'d' * 300}/x.csv"])
def test_places_that_cannot_be_get_a_sentence_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError), atomic_write(tmp_path / name, "sweep"):
        pytest.fail("the work began")
    with pytest.raises(UserError), atomic_folder(tmp_path / name, "model", ["a"]):
        pytest.fail("the work began")
    assert content(tmp_path) == {"file": b"mine"}


def test_a_folder_without_permission_gets_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="no permission to write into"), atomic_write(tmp_path / "x.csv", "sweep"):
        pytest.fail("the work began")


# Whole folders --------------------------------------------------------------------------------------------------------


def test_own_folders_are_replaced(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_folder(tmp_path / "m", text)
    assert (tmp_path / "m" / "a").read_text() == "two"
    (tmp_path / "m" / "a").unlink()
    (tmp_path / "m" / ".DS_Store").write_text("of a file manager")
    write_folder(tmp_path / "m", "three")
    assert {path.name for path in (tmp_path / "m").iterdir()} == {RECORD, "a", "b"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def add_file(folder: Path) -> None:
    (folder / "thesis.tex").write_text("mine")


def add_folder(folder: Path) -> None:
    (folder / ".git" / "objects").mkdir(parents=True)


def add_link(folder: Path) -> None:
    (folder / "c").symlink_to("a")


def add_output(folder: Path) -> None:
    write(folder / "results.csv", "ours, but not of the folder", kind="model")


def edit(folder: Path) -> None:
    (folder / "b").write_text("better")


def swap_for_link(folder: Path) -> None:
    (folder / "a").rename(folder.parent / "elsewhere")
    (folder / "a").symlink_to(folder.parent / "elsewhere")


def lose_record(folder: Path) -> None:
    (folder / RECORD).unlink()


@pytest.mark.parametrize("change", [add_file, add_folder, add_link, add_output, edit, swap_for_link, lose_record])
def test_a_folder_with_anything_else_in_it_stays(tmp_path: Path, change: Callable[[Path], None]) -> None:
    write_folder(tmp_path / "m", "one")
    change(tmp_path / "m")
    before = content(tmp_path)
    with pytest.raises(UserError, match="which anyres did not write or which was changed since"):
        write_folder(tmp_path / "m", "two")
    assert content(tmp_path) == before


def test_files_links_and_where_one_is_are_not_replaced_by_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "m", "one")
    (tmp_path / "link").symlink_to("m")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "broken").symlink_to("nothing")
    before = content(tmp_path)
    for name in ("link", "file", "broken", "file/m"):
        with pytest.raises(UserError):
            write_folder(tmp_path / name, "two")
    monkeypatch.chdir(tmp_path / "m")
    for place in (Path("."), Path("/")):
        with pytest.raises(UserError, match="cannot be replaced"):
            write_folder(place, "two")
    assert content(tmp_path) == before


def interrupt_rename(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Stop at the given rename, as a kill does: nothing is tidied up."""
    original, calls = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)


def test_readers_find_what_a_killed_writer_left_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = as_a(ResFormer, create_model("resformer_tiny", depth=1))
    run = tmp_path / "run"
    model.save_pretrained(run / "best")
    other = as_a(ResFormer, create_model("resformer_tiny", depth=1))
    with monkeypatch.context() as patch:
        interrupt_rename(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(run / "best")
    assert not (run / "best").exists()
    before = content(run)
    weight = model.get_parameter("head.weight")
    assert torch.equal(anyres.load_pretrained(run / "best").get_parameter("head.weight"), weight)
    from anyres.inference.modelspec import open_model
    from anyres.tasks.weights import weights_file

    assert torch.equal(open_model(str(run))[1].get_parameter("head.weight"), weight)
    assert weights_file(str(run)).is_file()
    assert content(run) == before
    model.save_pretrained(run / "best")
    assert existing(run / "best") == run / "best"
    assert not (run / ".best.old").exists()


def test_a_reader_meets_no_half_of_a_folder_while_it_is_replaced(tmp_path: Path) -> None:
    path, stop = tmp_path / "m", threading.Event()
    write_folder(path, "0")

    def replace() -> None:
        number = 0
        while not stop.is_set():
            write_folder(path, str(number := number + 1))

    writer = threading.Thread(target=replace)
    writer.start()
    seen: set[tuple[str, ...]] = set()
    while len(seen) < 30:
        seen.add(files.read_whole(path, lambda place: tuple((place / name).read_text() for name in "ab")))
    stop.set()
    writer.join()
    assert all(first == second for first, second in seen)
    with pytest.raises(FileNotFoundError):
        files.read_whole(tmp_path / "none", lambda place: (place / "a").read_text())


def test_a_backup_with_the_name_of_ours_is_kept(tmp_path: Path) -> None:
    (tmp_path / ".m.old").mkdir()
    (tmp_path / ".m.old" / "thesis.tex").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"\.m\.old holds thesis\.tex"):
        write_folder(tmp_path / "m", "one")
    assert content(tmp_path) == before


# Saved models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> ResFormer:
    return as_a(ResFormer, create_model("resformer_tiny", depth=1))


def test_a_model_is_not_saved_over_a_thesis(tmp_path: Path, model: ResFormer) -> None:
    for names in (["thesis.tex"], ["config.json"], ["config.json", "model.safetensors", "README.md"]):
        folder = tmp_path / str(len(names)) / names[0]
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text('{"architecture": "mine", "anyres": {}}')
        before = content(tmp_path)
        with pytest.raises(UserError, match=f"holds ({'|'.join(names)})"):
            model.save_pretrained(folder)
        assert content(tmp_path) == before


def test_an_edited_model_card_is_kept(tmp_path: Path, model: ResFormer) -> None:
    model.save_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    with (tmp_path / "m" / "README.md").open("a") as card:
        card.write("## What I found\n")
    with pytest.raises(UserError, match=r"holds README\.md"):
        model.save_pretrained(tmp_path / "m")
    assert "What I found" in (tmp_path / "m" / "README.md").read_text()


def test_a_model_of_version_0_1_is_replaced_unless_its_card_was_edited(tmp_path: Path, model: ResFormer) -> None:
    model.save_pretrained(tmp_path / "m")
    lose_record(tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    lose_record(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("my model")
    with pytest.raises(UserError, match=r"holds README\.md"):
        model.save_pretrained(tmp_path / "m")


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '{"anyres": 1, "architecture": []}', "\x00"])
def test_any_config_of_somebody_else_is_refused_in_a_sentence(tmp_path: Path, model: ResFormer, text: str) -> None:
    for name in hub.NAMES:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="holds README"):
        model.save_pretrained(tmp_path)


# The lock -------------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from anyres.io.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
LOADER = """
import sys, time, torch
from anyres.io.files import locked
with locked(sys.argv[1]):
    workers = torch.utils.data.DataLoader(range(100), num_workers=2)
    next(iter(workers))
    print("held", flush=True)
    for _ in workers:
        time.sleep(60)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_holder_of_a_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(HOLD, str(folder))
    try:
        with (
            pytest.raises(UserError, match=rf"run is in use by process {process.pid} on .* \(-c .*, since 20"),
            locked(folder),
        ):
            pytest.fail("two hold it")
    finally:
        process.kill()
        process.wait()
    with locked(folder):
        pass
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("code", [HOLD, LOADER])
def test_the_lock_of_a_dead_process_blocks_nobody(tmp_path: Path, code: str) -> None:
    """Not even while the loader's workers, which were forked with the lock held, are still there."""
    process = start(code, str(tmp_path))
    process.send_signal(signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - began < 2
    assert not (tmp_path / LOCK).exists()


def test_a_folder_that_was_only_locked_is_left_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a mistake"), locked(tmp_path / "run"):
        raise UserError("a mistake")
    assert not (tmp_path / "run").exists()
    with locked(tmp_path):
        write(tmp_path / "x.csv", "one")
    assert {path.name for path in tmp_path.iterdir()} == {RECORD, LOCK, "x.csv"}


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with a sentence and leave the folder as it is."""

    def check(folder: Path, *arguments: object) -> str:
        before = content(folder)
        assert main([str(argument) for argument in arguments]) == 2
        error = capfd.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("anyres: ")]
        assert len(lines) == 1, error
        assert content(folder) == before
        return lines[0]

    return check


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = as_a(DeiT, create_model("deit_tiny"))
    path = tmp_path_factory.mktemp("published") / "deit.pth"
    torch.save({"model": network.to_published(network.state_dict())}, path)
    return path


def test_convert_keeps_what_is_there(tmp_path: Path, published: Path, refused: Callable[..., str]) -> None:
    mine = tmp_path / "mine.pth"
    mine.write_bytes(published.read_bytes())
    assert "is the input itself" in refused(tmp_path, "convert", mine, mine)
    assert "mine.pth exists" in refused(tmp_path, "convert", published, mine, "--to=published")
    assert "is not a folder" in refused(tmp_path, "convert", published, mine / "folder")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.tex").write_text("mine")
    assert "docs holds thesis.tex" in refused(tmp_path, "convert", published, tmp_path / "docs")
    for output in ("new.safetensors", "folder"):
        for _ in range(2):
            assert main(["convert", str(published), str(tmp_path / output)]) == 0
    assert "is the input itself" in refused(tmp_path, "convert", tmp_path / "folder", tmp_path / "folder")
    (tmp_path / "folder" / "notes").write_text("mine")
    assert "folder holds notes" in refused(tmp_path, "convert", published, tmp_path / "folder")
