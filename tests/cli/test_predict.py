"""`anyres predict` into files: formats, continuing, sharing, and refusals."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import anyres
from anyres.cli import progress
from anyres.cli.main import main
from anyres.cli.progress import FileProgress, speed
from anyres.inference import unfinished
from anyres.inference.peers import Peers
from anyres.tasks.segmentation.network import Segmenter

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
FILES = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "model"
    torch.manual_seed(0)
    made: Any = anyres.create_model("resformer_tiny", num_classes=3, **SMALL)
    nn.init.normal_(made.head.weight)
    made.pretrained_cfg |= {"label_names": ['a "cat",\nor two', "=dog", "owl"], "train_sizes": [[24, 24]]}
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(FILES - 2):
        pixels = rng.integers(0, 256, (*rng.choice([16, 24, 40], 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    (folder / "05b.png").write_bytes(b"no image")
    (folder / "x.jpg").write_bytes(b"")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "PART_FILES", 4)
    monkeypatch.setattr(os, "fsync", lambda _: None)


def predict(*words: object) -> int:
    return main(["predict", *map(str, words), "device=cpu", "batch_size=4"])


def test_the_formats_hold_the_same(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pyarrow import parquet

    for suffix in ("csv", "jsonl", "parquet"):
        assert predict(model, photos, "size=native", "topk=2", f"output={tmp_path / 'p'}.{suffix}") == 0
        said = capsys.readouterr()
        assert said.out == f"wrote {tmp_path / 'p'}.{suffix}\n"
        assert said.err.splitlines()[-1] == f"2 of {FILES} files could not be read."
    text = list(csv.DictReader((tmp_path / "p.csv").open(newline="")))
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").open()]
    assert lines == parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert [*text[0]] == [*lines[0]] == ["image", "rank", "label", "probability", "problem"]
    assert len(text) == len(lines) == 2 * (FILES - 2) + 2
    for row, line in zip(text, lines, strict=True):
        assert row["image"] == line["image"]
        assert row["problem"] == (line["problem"] or "")
        assert row["rank"] == str(line["rank"] or "")
        assert row["label"].removeprefix("'") == (line["label"] or "")
        assert row["probability"] == ("" if line["probability"] is None else f"{line['probability']:.4f}")
    assert predict(model, photos, "size=native", "topk=2", "layout=jsonl") == 0
    assert capsys.readouterr().out == (tmp_path / "p.jsonl").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {".anyres.jsonl", "p.csv", "p.jsonl", "p.parquet"}


def in_copy(act: Callable[[], int]) -> int:
    """Start a copy of this process that does something and then ends; return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = act()
        finally:
            os._exit(code)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("workers", [0, 1])
def test_killed_while_it_works_it_continues(
    workers: int, model: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [model, photos, "size=native", f"workers={workers}"]
    assert predict(*words, f"output={tmp_path / 'whole.csv'}") == 0
    output, rounds = tmp_path / "p.csv", 0
    while not output.exists():
        rounds += 1
        before = parts(output)
        child = in_copy(lambda: predict(*words, f"output={output}"))
        while parts(output) == before and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):  # it has ended by itself
            assert output.exists()
    assert rounds > 2
    assert "files are done already" in capfd.readouterr().err
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert predict(*words, f"output={output}") == 0
    assert not output.with_name("p.csv.partial").exists()


def parts(output: Path) -> list[str]:
    folder = output.with_name(f"{output.name}.partial")
    return sorted(path.name for path in folder.glob("rows-*")) if folder.exists() else []


def test_a_file_that_vanished_and_one_named_twice_have_their_rows(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [tmp_path / f"{number}.png" for number in range(9)]
    for path in given:
        path.write_bytes((photos / "00.png").read_bytes())
    words = [model, *given, given[0], "topk=1", f"output={tmp_path / 'p.csv'}"]
    monkeypatch.setattr(unfinished.UnfinishedTable, "_join", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        predict(*words)
    for part in parts(tmp_path / "p.csv")[1:]:
        (tmp_path / "p.csv.partial" / part).unlink()
    given[-1].unlink()
    monkeypatch.undo()
    assert predict(*words) == 0
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [row["image"] for row in rows] == [*map(str, given), str(given[0])]
    assert [row["image"] for row in rows if row["problem"]] == [str(given[-1])]


def test_another_model_or_option_does_not_continue(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "p.csv"
    monkeypatch.setattr(unfinished.UnfinishedTable, "_join", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        predict(model, photos, f"output={output}")
    monkeypatch.undo()
    other: Any = anyres.load_pretrained(model)
    with torch.no_grad():
        other.head.bias[0] += 1
    other.save_pretrained(tmp_path / "other")
    for words, reason in (
        ([model, photos, "topk=2"], "topk was 5 and is now 2"),
        ([model, photos, "size=32"], 'size was null and is now "32"'),
        ([model, photos / "00.png"], "other files"),
        ([tmp_path / "other", photos], "model was"),
    ):
        assert predict(*words, f"output={output}") == 2
        assert reason in capsys.readouterr().err
    assert predict(model, photos, f"output={output}", "workers=1") == 0


def test_pictures_are_optional(tmp_path: Path, photos: Path) -> None:
    torch.manual_seed(0)
    network: Any = Segmenter.build("resformer_tiny", 3, dict(SMALL), head="semantic_fpn", channels=16)
    network.pretrained_cfg["train_sizes"] = [[24, 24]]
    network.save_pretrained(tmp_path / "model")
    names = [photos / f"{number:02d}.png" for number in range(3)]
    words = [tmp_path / "model", *names, photos / "x.jpg", "size=native", f"pictures={tmp_path / 'drawn'}"]
    assert predict(*words, "draw=false", f"output={tmp_path / 'a.jsonl'}") == 0
    assert not (tmp_path / "drawn").exists()
    assert predict(*words, f"output={tmp_path / 'b.jsonl'}") == 0
    plain, drawn = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in "ab")
    pictures = [row.pop("picture") for row in drawn]
    assert drawn == plain
    assert {Path(path).name for path in pictures if path} == {"00.png", "01.png", "02.png"}
    assert pictures[-1] is None
    assert sum(row["share of pixels"] for row in plain if row["share of pixels"]) == pytest.approx(3)


@pytest.mark.parametrize(("words", "sentence"), [
    (["output=p.json"], "p.json does not end in .csv, .jsonl or .parquet"),
    (["size=natural"], "it must be a side (224), HEIGHTxWIDTH (224x320), native, native:SIDE or original"),
    (["size=native:2"], "size native:2 is below the model's minimum: give at least 4"),
    (["workers=-1"], "workers -1 must be between 0"),
])  # fmt: skip
def test_mistakes_are_told(
    words: list[str], sentence: str, model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert predict(model, photos, *words) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_several_processes_need_a_file(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Peers, "__init__", lambda self: self.__dict__.update(rank=0, world=2, local_rank=0))
    assert predict(model, photos) == 2
    assert "2 processes cannot print one table: give an output file" in capsys.readouterr().err


def test_progress_says_speed_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed(100, 150, 50, "image") == "2.0 images/s  0:01:15 left"
    assert speed(0, 150, 50, "clip").endswith("– left")
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with FileProgress(1000, 100, "image", Peers()) as shown:
        for _ in range(200):
            now += 0.25
            shown.step()
    assert capsys.readouterr().err == "140 of 1,000 files  4.0 images/s  0:03:35 left\n"
