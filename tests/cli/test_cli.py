"""The command line as people use it: right and wrong. One file, though long: its fixtures are slow to make."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anyres.cli.main import main
from anyres.io.text import from_csv, printable
from anyres.models._registry import create_model
from anyres.models.deit import DeiT
from tests.typed import as_a

TINY = "embed_dim=24,depth=1,num_heads=2,patch_size=4"

Sentence = Callable[..., str]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables fold long paths to the width of the terminal."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def no_trace(capfd: pytest.CaptureFixture[str]) -> Sentence:
    """Runs a command that must fail: exit code, and one sentence on the error stream."""

    def check(*arguments: object) -> str:
        code = run(*arguments)
        error = capfd.readouterr().err
        assert code != 0
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if line.startswith("anyres: ")]
        assert len(lines) == 1, error
        return lines[0]

    return check


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("my run ä") / "run"  # a space and an umlaut in the path
    options = [
        "data=digits",
        "sizes=16,12",
        f"model_args={TINY}",
        "epochs=1",
        "--warmup-epochs=0",
        "mixup=0",
        "cutmix=0",
    ]
    options += ["auto_augment=none", "hflip=0", "erasing=0", "--no-progress", "fraction=0.1", f"output={folder}"]
    assert run("train", "--model", "resformer_tiny", *options) == 0
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    (folder / "empty.png").write_bytes(b"")
    return folder


def test_train_writes_a_run(digits_run: Path) -> None:
    assert (digits_run / "config.yaml").is_file()
    assert json.loads((digits_run / "summary.json").read_text())["status"] == "finished"
    config = json.loads((digits_run / "best" / "config.json").read_text())
    assert config["anyres"]["train_sizes"] == [[16, 16], [12, 12]]
    assert config["pretrained_cfg"]["label_names"] == [str(digit) for digit in range(10)]


def test_predict_names_labels_and_counts_bad_files(
    digits_run: Path, pictures: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("predict", digits_run, pictures, "--size", "17x23", "--topk", 3) == 0
    out = capfd.readouterr()
    assert "2 of 5 files could not be read" in out.err
    assert "broken.jpg" in out.out
    assert run("predict", digits_run, pictures, "output=" + str(tmp_path / "p.csv")) == 0
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert len(rows) == 3 * 5 + 2
    assert sum(bool(row["problem"]) for row in rows) == 2
    shares: dict[str, float] = {}
    for row in rows:
        shares[row["image"]] = shares.get(row["image"], 0) + float(row["probability"] or 0)
    assert all(share <= 1.001 for share in shares.values())
    assert run("predict", digits_run, pictures / "empty.png") == 2
    assert "None of the 1 files" in capfd.readouterr().err


def test_predict_agrees_with_the_model_called_by_hand(
    digits_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from anyres import load_pretrained

    pixels = np.random.default_rng(1).integers(0, 255, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    model = load_pretrained(digits_run / "best")
    x = torch.from_numpy(pixels)[None, None] / 255 / torch.tensor(model.pretrained_cfg["std"][0])
    expected = model(x).softmax(-1)[0]
    assert run("predict", digits_run, tmp_path / "x.png", "--size=16", "--topk=1", "--layout=csv") == 0
    row = capfd.readouterr().out.splitlines()[1].split(",")
    assert row[2] == str(expected.argmax().item())
    assert float(row[3]) == pytest.approx(expected.max().item(), abs=1e-3)


def test_sweep_compares_a_run_and_a_saved_model(
    digits_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    models = [f"first:={digits_run}", digits_run / "last"]
    assert run("sweep", *models, "sizes=12,16,20x14", "--no-cost", f"output={out}") == 0
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert len(rows) == 6
    assert {row["model"] for row in rows} == {"first", "run (last)"}
    assert (out / "report.html").is_file()
    assert (out / "sweep.png").stat().st_size > 10_000
    lines = {line.split()[0]: line for line in capfd.readouterr().out.splitlines() if line.strip()}
    assert [lines[size].count("*") for size in ("12", "16", "20x14")] == [2, 2, 0]


def test_models_and_info(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("models", "resformer", "--layout", "csv") == 0
    rows = list(csv.DictReader(capfd.readouterr().out.splitlines()))
    assert [row["model"] for row in rows] == ["resformer_base", "resformer_small", "resformer_tiny"]
    assert rows[1]["top-1 (%)"] == "82.2"
    assert run("info", "deit_tiny_patch16_224", "sizes=224") == 0
    out = capfd.readouterr().out
    assert "5,717,416" in out
    assert "Apache-2.0" in out
    assert "72.20" in out


def test_convert_there_and_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = as_a(DeiT, create_model("deit_tiny"))
    torch.save({"model": model.to_published(model.state_dict())}, tmp_path / "published.pth")
    assert run("convert", tmp_path / "published.pth", tmp_path / "ours.safetensors") == 0
    assert "deit_tiny" in capfd.readouterr().out
    assert run("convert", tmp_path / "published.pth", tmp_path / "folder", "--model=deit_tiny") == 0
    assert run("convert", tmp_path / "folder", tmp_path / "back.pth", "--to", "published") == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert "pos_embed" in back
    assert all(torch.equal(back[k], v) for k, v in model.to_published(model.state_dict()).items())


def test_outputs_keep_what_is_there_and_are_repeated(
    no_trace: Sentence, digits_run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.io.test_files import content

    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.csv").write_text("mine")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "report.html").write_text("mine")
    before = content(tmp_path)
    monkeypatch.setattr("anyres.inference.modelspec.open_model", lambda *_: pytest.fail("the work began"))
    assert "results.csv exists" in no_trace("predict", digits_run, pictures, "output=results.csv")
    weights = digits_run / "best" / "model.safetensors"
    assert "not a predictions file" in no_trace("predict", digits_run, pictures, f"output={weights}")
    assert "results.csv is not a folder" in no_trace("predict", digits_run, pictures, "output=results.csv/x.csv")
    assert "report.html exists" in no_trace("sweep", digits_run, "output=sweep")
    assert "results.csv is not a folder" in no_trace("sweep", digits_run, "output=results.csv")
    assert "results.csv exists" in no_trace("detect", "test", digits_run, "results=results.csv")
    assert content(tmp_path) == before
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run("predict", digits_run, pictures, "output=new.csv") == 0
    assert "/dev/full: the disk is full" in no_trace("predict", digits_run, pictures, "output=/dev/full")


def test_flags_and_empty_lists_as_words() -> None:
    from anyres.cli.arguments import parse
    from anyres.cli.commands import COMMANDS

    def values(*arguments: str) -> dict[str, Any]:
        return parse("anyres", "", COMMANDS, arguments)[1]

    for word, value in (("cost=false", False), ("--cost=True", True), ("--no-cost", False), ("--cost", True)):
        assert values("sweep", "x", word)["cost"] is value
    given = values("detect", "train", "decay=linear", "drops=", "wandb=true")
    assert given == {"model": None, "recipe": None, "decay": "linear", "drops": "", "wandb": True}
    # Options may stand between the files of a list, and behind -- is none.
    given = values("predict", "run", "a b.png", "size=3", "ä=1.png", "--topk", "2", "--", "-c.png", "--size=4")
    assert given["files"] == ["a b.png", "ä=1.png", "-c.png", "--size=4"]
    assert (given["size"], given["topk"]) == ("3", 2)
    assert values("predict", "run", "./-x.png", "--output", "-out.csv")["output"] == "-out.csv"
    # The value of an option by itself may look like an option.
    assert values("train", "--model_args", "patch_size=8", "--no-wandb", "lr=1")["model_args"] == "patch_size=8"


WRONG = {
    "flag": (["sweep", "x", "cost=maybe"], "--cost is 'maybe'; it must be true or false"),
    "command": (["trian"], "did you mean train"),
    "option": (["train", "--batch-siz=3"], "--batch-size"),
    "bare option": (["sweep", "x", "szies=12"], "no option --szies; did you mean --sizes"),
    "demo's epochs": (["segment", "demo", "epochs=0"], "epochs"),
    "separator as a value": (["sweep", "x", "--output", "--"], "--output is '--'"),
    "separator as a bare value": (["sweep", "x", "output=--"], "--output is '--'"),
    "size below the minimum": (["info", "deit_tiny", "sizes=96,2"], "size 2x2 is below the model's minimum"),
    "bare option value": (["sweep", "x", "sizes=12,abc"], "abc"),
    "file like an option": (["predict", "x", "-y.png"], "no option -y.png; write .* as ./-y.png"),
    "no value": (["predict", "x", "y", "--topk"], "--topk: expected one argument"),
    "number": (["predict", "x", "y", "--topk", "three"], "whole number"),
    "model": (["info", "resformer_smal"], "resformer_small"),
    "no model matches": (["models", "bert"], "bert"),
    "recipe": (["train", "recipe=resformer_smal"], "resformer_small"),
    "missing data": (["train", "data=/no/such/folder"], "/no/such/folder"),
    "missing run": (["sweep", "runs/none/best"], "runs/none/best"),
    "missing weights": (["sweep", "deit_tiny=none.pth"], "none.pth"),
    "device": (["sweep", "x", "device=gpu"], "gpu"),
    "device that is not there": (["sweep", "deit_tiny", "device=xla"], "device is 'xla', but this machine"),
    "no such weights": (["sweep", "x", "weights=worst"], "weights is 'worst'"),
    "group": (["sweep", "runs/a+"], r"runs/a\+ has a \+ without a model on both sides"),
    "no batch": (["sweep", "x", "batch_size=0"], "batch_size is 0; it must be at least 1"),
    "less than no batch": (["predict", "x", "y", "--batch-size=-1"], "batch_size is -1; it must be at least 1"),
    "training size": (["train", "data=digits", "sizes=8", f"model_args={TINY.replace('4', '16')}"], "minimum|multiple"),
    "model option": (["train", "data=digits", "model_args=dept=3", "sizes=32"], "depth"),
    "value": (["train", "epochs=none"], "whole number"),
    "number beyond 64 bits": (["train", f"seed={1 << 63}"], "seed is 9223372036854775808; it must be at most 214748"),
    "number beyond 32 bits": (["detect", "train", f"repeats={1 << 32}"], "repeats is 4294967296; it must be at most"),
    "processes": (["train", "data=digits", "workers=65536"], "workers 65536 must be between 0 .* and 1024"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_mistakes_get_one_sentence(
    kind: str, no_trace: Sentence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    arguments, hint = WRONG[kind]
    assert re.search(hint, no_trace(*arguments))


def test_mistakes_with_files(no_trace: Sentence, tmp_path: Path, pictures: Path, digits_run: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("epoch: 3\n")
    assert "epochs" in no_trace("train", f"recipe={tmp_path / 'recipe.yaml'}")
    (tmp_path / "data" / "cat").mkdir(parents=True)
    assert "cat" in no_trace("train", f"data={tmp_path / 'data'}", f"output={tmp_path / 'run'}")
    (tmp_path / "empty").mkdir()
    assert "no images" in no_trace("predict", digits_run, tmp_path / "empty")
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    assert "bad.pth" in no_trace("predict", tmp_path / "bad.pth", pictures)
    torch.save({"model": create_model("deit_tiny", depth=1).state_dict()}, tmp_path / "other.pth")
    assert "does not fit" in no_trace("predict", f"resformer_tiny={tmp_path / 'other.pth'}", pictures)
    assert "fits no registered model" in no_trace("convert", tmp_path / "other.pth", tmp_path / "x.safetensors")
    assert "a single file" in no_trace("convert", digits_run / "best", tmp_path / "x", "--to=published")


def test_a_full_disk_is_one_sentence(
    no_trace: Sentence, monkeypatch: pytest.MonkeyPatch, digits_run: Path, tmp_path: Path
) -> None:
    import errno

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x.safetensors"))

    monkeypatch.setattr("anyres.models._checkpoints.save_file", full)
    as_a(DeiT, create_model("deit_tiny")).save_pretrained(tmp_path / "m")
    assert "disk is full" in no_trace("convert", tmp_path / "m", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (MemoryError(), "smaller batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "smaller batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "smaller batch_size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "by signal: Killed.*fewer workers"),
    ],
)
def test_limits_of_the_machine_get_one_sentence(
    error: Exception, hint: str, no_trace: Sentence, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("anyres.training.train", fail)
    assert re.search(hint, no_trace("train", "data=digits"))


def test_a_defect_in_a_loading_process_has_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")

    monkeypatch.setattr("anyres.training.train", fail)
    with pytest.raises(RuntimeError, match="Caught"):
        main(["train", "data=digits"])


NAMES = [
    b"d[bold] :smile:.png",
    b"[red]a\x1b[31m\x07.png",
    b"caf\xe9\xff.png",
    b"=HYPERLINK(1).png",
    b"-x +y @z.png",
    "one\ntwo\u202egnp.exe 猫.png".encode(),
    b"$\\foo_x^2$ %s {0}.png",
    b"n" * 251 + b".png",
]
"""Names of files and folders that the file system takes."""


@pytest.fixture(scope="module")
def named_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on classes of such names, some of whose files cannot be read; and the folder of its data."""
    root = tmp_path_factory.mktemp("named")
    for place, name in enumerate(NAMES):
        folder = os.fsencode(root / "data") + b"/" + name.removesuffix(b".png")
        os.makedirs(folder)
        for number in range(40):
            Image.new("L", (16, 16), 30 * place).save(os.fsdecode(folder + b"/%d" % number + name[-9:]))
    (root / "data" / os.fsdecode(NAMES[2][:-4]) / os.fsdecode(b"bad\xff\x1b.png")).write_bytes(b"no image")
    options = ["sizes=16", f"model_args={TINY}", "epochs=1", "--warmup-epochs=0", "auto_augment=none", "--no-progress"]
    options += ["batch_size=20", f"output={root / 'run'}", f"data={root / 'data'}", "max_bad_fraction=0.5"]
    assert run("train", "--model", "resformer_tiny", *options) == 0
    return root


def test_any_name_goes_all_the_way(named_run: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = sorted(os.fsdecode(name.removesuffix(b".png")) for name in NAMES)
    config = json.loads((named_run / "run" / "best" / "config.json").read_text(encoding="utf-8"))
    assert config["pretrained_cfg"]["label_names"] == names
    summary = json.loads((named_run / "run" / "summary.json").read_text(encoding="utf-8"))
    bad = list(summary["bad_images"]["files"])
    assert [os.fsencode(name).endswith(b"bad\xff\x1b.png") for name in bad] == [True]
    for name in NAMES:
        Image.new("L", (16, 16), 90).save(tmp_path / os.fsdecode(name))
    (tmp_path / "d[").mkdir()
    Image.new("L", (16, 16), 90).save(tmp_path / "d[" / "foo].png")
    (tmp_path / os.fsdecode(b"broken\xff\x1b[2J.png")).write_bytes(b"no image")
    capfd.readouterr()
    assert run("predict", named_run / "run", tmp_path, "topk=8") == 0
    table = capfd.readouterr().out
    assert printable(table, keep="\n") == table
    assert "d[/foo].png" in table
    assert "d[bold] :smile:.png" in table
    assert r"[red]a\x1b[31m\x07" in table
    assert r"caf\xe9\xff" in table
    assert run("predict", named_run / "run", tmp_path, "topk=8", "layout=csv") == 0
    text = capfd.readouterr().out
    assert run("predict", named_run / "run", tmp_path, "topk=8", f"output={tmp_path / 'p.csv'}") == 0
    assert (tmp_path / "p.csv").read_text(encoding="utf-8") == text
    assert printable(text, keep="\n") == text
    rows = list(csv.DictReader(io.StringIO(text)))
    found = {from_csv(row["label"]) for row in rows if row["label"]}
    assert found == {printable(name, keep="\n") for name in names}
    assert not [row for row in rows if row["label"].startswith(("=", "-", "+", "@"))]


def test_a_sweep_of_several_runs_and_of_chosen_weights(
    digits_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], no_trace: Sentence
) -> None:
    out = tmp_path / "sweep"
    group = f"both:={digits_run}+{digits_run / 'best'}"
    assert run("sweep", group, digits_run, "weights=last", "sizes=12", "images=20", "--no-cost", f"output={out}") == 0
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [row["model"] for row in rows] == ["both: run (last)", "both: run (best)", "run (last)", "both"]
    assert {row["of"] for row in rows} == {"360"}
    assert "on 20 of 360 images" in capfd.readouterr().out
    assert "last, of run folders" in (out / "report.html").read_text()
    assert "holds no last_ema weights: give weights=best or weights=last" in no_trace(
        "sweep", digits_run, "weights=last_ema", f"output={tmp_path / 'other'}"
    )


def test_a_runs_own_sweep_is_in_its_model_card(digits_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    card = digits_run / "last" / "README.md"
    for sizes in ("12", "16,20x14"):  # the second takes the place of the first
        assert (
            run("sweep", digits_run, "weights=last", f"sizes={sizes}", "--no-cost", f"output={digits_run}/sweep") == 0
        )
    text = card.read_text(encoding="utf-8")
    assert "Training data: digits." in text
    assert text.count("## Score by input size") == 1
    assert "Top-1 accuracy in percent on 360 images of digits/val." in text
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")] == [
        "| size (px)", "| ---", "| 16", "| 20×14"
    ]  # fmt: skip
    edited = text + "mine"
    card.write_text(edited, encoding="utf-8")
    assert run("sweep", digits_run, "weights=last", "sizes=12", "--no-cost", f"output={digits_run}/sweep") == 0
    assert card.read_text(encoding="utf-8") == edited
    assert "keeps its model card" in capfd.readouterr().err
    card.write_text(text, encoding="utf-8")


def test_a_sweep_of_any_name(named_run: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for number, label in enumerate((os.fsdecode(b"$\\foo$\x1b[2J\xff"), "=1+1", "x" * 5000)):
        out = tmp_path / f"{number} \u202eä"
        model = f"{label}:={named_run / 'run'}"
        assert run("sweep", model, f"data={named_run / 'data'}", "sizes=16,20", "--no-cost", f"output={out}") == 0
        printed = capfd.readouterr()
        for text in (printed.out, printed.err, (out / "report.html").read_text(encoding="utf-8")):
            assert printable(text, keep="\n") == text
        rows = list(csv.DictReader((out / "sweep.csv").open(encoding="utf-8")))
        assert {from_csv(row["model"]) for row in rows} == {printable(label)}
