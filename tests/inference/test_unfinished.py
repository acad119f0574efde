"""Tables of predictions that are killed, continued and shared between processes."""

from __future__ import annotations

import csv
import os
import random
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from anyres.errors import UserError
from anyres.inference import unfinished
from anyres.inference.peers import Peers
from anyres.inference.unfinished import FileList, UnfinishedTable, Wanted
from anyres.io import files
from anyres.io.tables import TABLES
from tests.io.test_files import content

COLUMNS = {"image": str, "rank": int}
SETTINGS = {"size": "224", "files": ["/photos"]}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "PART_FILES", 3)
    monkeypatch.setattr("anyres.inference.peers.PAUSE", 0.01)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a kill, unlike a power cut, loses nothing that was written


def wanted(count: int) -> list[Wanted]:
    return [Wanted(f'a "{number}",\n', f"{number}.png") for number in range(count)]


def work(output: Path, count: int, stop: int | None = None, settings: Any = SETTINGS) -> UnfinishedTable:
    """Make a table of two rows for each file, the third and every tenth after it being unreadable."""
    table = UnfinishedTable(output, TABLES[output.suffix](COLUMNS), Peers())
    with table.opened(settings, lambda: wanted(count)) as rows:
        for number, (place, entry) in enumerate(rows.todo()):
            if number == stop:
                raise KeyboardInterrupt
            rows.add(place, [[entry.path, rank] for rank in range(2)], readable=place % 10 != 3)
    return table


def check(output: Path, count: int) -> None:
    header, *rows = csv.reader(output.open(newline=""))
    assert header == list(COLUMNS)
    assert rows == [[entry.path, str(rank)] for entry in wanted(count) for rank in range(2)]
    assert not output.with_name(f"{output.name}.partial").exists()


def forked(act: Callable[[], object]) -> int:
    """Run something in a copy of this process and return its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killing_at(step: int) -> None:
    """Make this process kill itself before the given change of the disk."""
    left = step

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return changed

    for place, name in ((os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "replace"), (os, "rmdir"),
                        (files, "_add_to_record")):  # fmt: skip
        setattr(place, name, counted(getattr(place, name)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_step_it_continues_without_loss_or_repetition(tmp_path: Path) -> None:
    output, count = tmp_path / "p.csv", 5

    def killed(step: int) -> None:
        killing_at(step)
        work(output, count)

    for step in range(1, 1000):
        code = forked(lambda: killed(step))  # noqa: B023 - called at once
        if code == 0:
            break
        assert code == -signal.SIGKILL
        table = work(output, count)
        assert table.unreadable == 1
        check(output, count)
    assert step > 30


def test_every_kind_of_table_continues(tmp_path: Path) -> None:
    for suffix in TABLES:
        whole, output = tmp_path / f"whole{suffix}", tmp_path / f"p{suffix}"
        work(whole, 20)
        rng = random.Random(0)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                work(output, 20, stop=rng.randint(1, 5))
        assert work(output, 20).unreadable == 2
        assert output.read_bytes() == whole.read_bytes() or suffix == ".parquet"


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    output = tmp_path / "p.csv"
    with pytest.raises(KeyboardInterrupt):
        work(output, 20, stop=7)
    table = UnfinishedTable(output, TABLES[".csv"](COLUMNS), Peers())
    with table.opened(SETTINGS, lambda: pytest.fail("the list is fixed")) as rows:
        assert (rows.done, rows.total) == (7, 20)
        places = []
        for place, entry in rows.todo():
            places.append(place)
            rows.add(place, [[entry.path, rank] for rank in range(2)], readable=True)
    assert places == list(range(7, 20))
    check(output, 20)


def test_interrupted_at_any_moment_rows_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock, every writing and every number of an earlier run is a moment for a signal."""
    for moment in range(1, 200):
        calls = 0

        def interrupting(real: Callable[..., Any]) -> Callable[..., Any]:
            def called(*arguments: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == moment:  # noqa: B023 - called in this round
                    raise KeyboardInterrupt
                return real(*arguments)

            return called

        with monkeypatch.context() as patch:
            patch.setattr(unfinished.time, "monotonic", interrupting(unfinished.time.monotonic))
            patch.setattr(unfinished.files, "_add_to_record", interrupting(files._add_to_record))
            patch.setattr(TABLES[".csv"], "text", interrupting(TABLES[".csv"].text))  # type: ignore[attr-defined]
            try:
                work(tmp_path / "p.csv", 8)
            except KeyboardInterrupt:
                pass
            else:
                break
        work(tmp_path / "p.csv", 8)
        check(tmp_path / "p.csv", 8)
    assert 15 < moment < 199


def test_a_missing_part_is_made_again(tmp_path: Path) -> None:
    output = tmp_path / "p.csv"
    with pytest.raises(KeyboardInterrupt):
        work(output, 20, stop=14)
    (tmp_path / "p.csv.partial" / "rows-000000003-000000006-1.csv").unlink()
    work(output, 20)
    check(output, 20)


def test_other_settings_are_refused_once_there_are_rows(tmp_path: Path) -> None:
    output = tmp_path / "p.csv"
    with pytest.raises(KeyboardInterrupt):
        work(output, 20, stop=0)
    assert not (tmp_path / "p.csv.partial").exists()
    with pytest.raises(KeyboardInterrupt):
        work(output, 20, stop=5)
    before = content(tmp_path)
    with pytest.raises(UserError, match=r'p.csv.partial is an unf.*\(size was "224" and is now "160"\): giv'):
        work(output, 20, settings={**SETTINGS, "size": "160", "files": ["/" + 99 * "x"]})
    with pytest.raises(UserError, match=r"settings \(other files\)"):
        work(output, 20, settings={**SETTINGS, "files": ["/" + 99 * "x"]})
    assert content(tmp_path) == before
    work(output, 20)
    check(output, 20)


def test_what_others_put_there_stays(tmp_path: Path) -> None:
    output, folder = tmp_path / "p.csv", tmp_path / "p.csv.partial"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    work(output, 4)
    assert output.exists()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"run.json exists, and it is not a predictions file as anyres wrote it"):
        work(output, 4)
    (folder / "run.json").unlink()
    (folder / "rows-000000000-000000003-0.csv").write_text("mine")
    with pytest.raises(UserError, match=r"p.csv.partial holds rows without run.json"):
        work(output, 4)
    assert (folder / "notes.txt").read_text() + (folder / "rows-000000000-000000003-0.csv").read_text() == "minemine"


def test_only_one_command_writes_a_table(tmp_path: Path) -> None:
    table = UnfinishedTable(tmp_path / "p.csv", TABLES[".csv"](COLUMNS), Peers())
    with table.opened(SETTINGS, lambda: wanted(3)) as rows:
        with pytest.raises(UserError, match="is in use by process"):
            work(tmp_path / "p.csv", 3)
        for place, entry in rows.todo():
            rows.add(place, [[entry.path, rank] for rank in range(2)], readable=True)
    check(tmp_path / "p.csv", 3)


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 5000])
def test_lists_are_read_from_any_place(count: int, tmp_path: Path) -> None:
    names = [Wanted(os.fsdecode(b"caf\xe9 \n%d" % number) + "x" * (number % 90), "" if number % 3 else f"{number}.png")
             for number in range(count)]  # fmt: skip
    FileList.write(names, tmp_path / "files")
    found = FileList(tmp_path / "files")
    assert len(found) == count
    assert list(found.read(0, count)) == names
    for start, stop in ((0, 1), (1000, 1030), (count - 1, count), (7, 7), (count // 2, count)):
        assert list(found.read(max(start, 0), min(stop, count))) == names[max(start, 0) : min(stop, count)]


def share(rank: int, world: int, port: int, act: Callable[[], object]) -> int:
    """Start a process of several; returns its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port)}  # fmt: skip
            act()
            code = 0
        except UserError:
            code = 2
        finally:
            os._exit(code)
    return child


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def ended(children: Iterable[int]) -> Iterator[int]:
    return (os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_share_the_files_and_another_number_of_them_continues(tmp_path: Path) -> None:
    output, count = tmp_path / "p.csv", 100
    with pytest.raises(KeyboardInterrupt):
        work(output, count, stop=10)

    def some() -> None:
        try:
            work(output, count, stop=13)
        except KeyboardInterrupt:
            raise UserError("stopped") from None

    port = free_port()
    assert list(ended([share(rank, 3, port, some) for rank in range(3)])) == [2, 2, 2]
    parts = sorted(path.name for path in (tmp_path / "p.csv.partial").glob("rows-*"))
    done = sum(int(name.split("-")[2]) - int(name.split("-")[1]) for name in parts)
    assert 10 + 13 <= done <= 10 + 3 * 13
    port = free_port()
    assert list(ended([share(rank, 2, port, lambda: work(output, count)) for rank in range(2)])) == [0, 0]
    check(output, count)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_if_the_first_process_refuses_the_others_end(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "p.csv", 20, stop=5)
    port = free_port()
    other = {**SETTINGS, "size": "160"}
    children = [share(rank, 2, port, lambda: work(tmp_path / "p.csv", 20, settings=other)) for rank in range(2)]
    assert list(ended(children)) == [2, 2]
