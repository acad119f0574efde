"""A folder as people have it: odd files and broken ones, through training, prediction and the sweep."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from anyres.cli.main import main
from tests.data.pictures import bad_files, encode, noise, odd_good_files

NETWORK = "model_args=embed_dim=24,depth=1,num_heads=2,patch_size=4"
OFF = ["mixup=0", "cutmix=0", "auto_augment=none", "erasing=0", "hflip=0", "warmup_epochs=0", "--no-progress"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photo album")
    for split in ("train", "val"):
        for name in ("cat", "dög"):
            place = root / split / name
            place.mkdir(parents=True)
            for i in range(6):
                (place / f"{i}.jpg").write_bytes(encode(noise(40, 50, i)))
            for file, content in odd_good_files().items():
                (place / file).write_bytes(content)
        for file, content in bad_files().items():
            (root / split / "cat" / file).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    sizes = ["sizes=24x16,16", "batch_size=10", "epochs=1", "workers=0", "max_bad_fraction=0.5"]
    arguments = ["train", "resformer_tiny", NETWORK, f"data={folder}", *sizes, *OFF, f"output={output}"]
    assert main(arguments) == 0
    return output


def test_training_counts_and_names_what_it_skipped(run: Path) -> None:
    bad = json.loads((run / "summary.json").read_text())["bad_images"]
    names = {file.rsplit("/", 1)[1] for file in bad["files"]}
    # The last, incomplete batch of the epoch is not read.
    assert names <= bad_files().keys()
    assert bad["count"] == len(names) >= len(bad_files()) - 3
    assert all(reason for reason in bad["files"].values())


def test_too_many_bad_files_stop_with_one_sentence(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "resformer_tiny", NETWORK, f"data={folder}", "sizes=16", "batch_size=10", "epochs=1", *OFF]
    assert main([*arguments, "workers=0", f"output={tmp_path / 'run'}"]) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert [line for line in error.splitlines() if line.startswith("anyres: ")]


def test_prediction_names_every_bad_file(run: Path, folder: Path, tmp_path: Path) -> None:
    assert main(["predict", str(run), str(folder / "val" / "cat"), f"output={tmp_path / 'p.csv'}", "topk=1"]) == 0
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    problems = {row["image"].rsplit("/", 1)[1] for row in rows if row["problem"]}
    assert problems == bad_files().keys()
    assert {row["label"] for row in rows} <= {"cat", "dög", ""}
    assert len(rows) == 6 + len(odd_good_files()) + len(bad_files())


def test_sweep_counts_bad_files(run: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sizes = "sizes=8,16,20x12"
    assert main(["sweep", str(run), f"data={folder}", sizes, "--no-cost", f"output={tmp_path / 's'}"]) == 0
    rows = list(csv.DictReader((tmp_path / "s" / "sweep.csv").open()))
    assert [int(row["bad"]) for row in rows] == [len(bad_files())] * 3
    assert [int(row["count"]) for row in rows] == [2 * (6 + len(odd_good_files()))] * 3
    assert "truncated.jpg" in (tmp_path / "s" / "report.html").read_text()
    assert "Traceback" not in capfd.readouterr().err


def test_pictures_of_twelve_bits_need_a_word_in_every_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name in ("bright", "dark"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(10):
            values = rng.integers(0, 2000, (20, 20)) + (2095 if name == "bright" else 0)
            Image.fromarray(values.astype(np.uint16)).save(tmp_path / "d" / name / f"{i}.png")
    model, data = str(tmp_path / "run"), f"data={tmp_path / 'd'}"
    train = ["train", "resformer_tiny", NETWORK, data, "sizes=16", "batch_size=6", "epochs=1", "workers=0", *OFF]
    commands = [
        [*train, f"output={model}"],
        ["sweep", model, data, "sizes=16", "--no-cost", f"output={tmp_path / 's'}"],
        ["predict", model, str(tmp_path / "d" / "dark"), f"output={tmp_path / 'p.csv'}"],
    ]
    for command in commands:
        assert main(command) == 2
        assert "has 16 bits, but no number above" in capfd.readouterr().err
        assert main([*command, "bit_depth=12"]) == 0


def test_weights_that_are_no_numbers_end_every_command(
    run: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "best", tmp_path / "spoilt")
    file = tmp_path / "spoilt" / "model.safetensors"
    state = load_file(file)
    state["norm.weight"][3] = torch.nan
    save_file(state, file)
    model = str(tmp_path / "spoilt")
    for command in (
        ["predict", model, str(folder / "val" / "cat")],
        ["sweep", model, f"data={folder}", "sizes=8", "--no-cost", f"output={tmp_path / 's'}"],
    ):
        assert main(command) == 2
        error = capfd.readouterr().err
        assert f"weights of {model} contain NaN or infinity, the first is norm.weight" in error
        assert "Traceback" not in error
