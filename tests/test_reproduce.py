"""docs/reproduce.md: every command runs, on a dozen little images in the layouts of the real datasets.

A line is typed as the page has it, but for little data and options that make networks, sizes and runs small. The runs
that it starts from are trained first. One line of every form runs always, the others with `-m slow`.
"""

from __future__ import annotations

import csv
import json
import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml
from PIL import Image

from anyres.cli.main import main
from anyres.training.config import RunConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproduce.md"
sys.path.append(str(ROOT / "benchmarks"))  # the scripts import each other
HOURS = runpy.run_path(str(ROOT / "benchmarks" / "hours.py"), run_name="hours")
IMAGES = {"/data/imagenet": 1_281_167, "/data/ade20k": 20_210, "/data/coco": 117_266, "/data/kinetics400": 240_000}
SHRINK = 4
"""Sides are a quarter of the page's."""
TINY = {"embed_dim": 16, "depth": 4, "num_heads": 2, "mlp_ratio": 1}
HEADS = {
    "upernet": {"channels": 8},
    "mask_rcnn": {"channels": 8, "hidden": 16, "rpn_post_nms": 10, "box_batch": 8},
}


def commands() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    return [line for block in blocks for line in block.splitlines() if line.startswith("anyres ")]


def noise(rng: np.random.Generator, side: int = 64) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (side, side + 8, 3), dtype=np.uint8))


def write_imagenet(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for wordnet in ("n01440764", "n01443537"):
            folder = root / split / wordnet
            folder.mkdir(parents=True)
            for number in range(count):
                noise(rng).save(folder / f"{wordnet}_{number}.JPEG", "JPEG")


def write_ade20k(root: Path) -> None:
    rng = np.random.default_rng(1)
    for split, short, count in (("training", "train", 4), ("validation", "val", 2)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            name = f"ADE_{short}_{number:08d}"
            noise(rng).save(root / "images" / split / f"{name}.jpg")
            blocks = np.kron(rng.integers(0, 151, (8, 9), dtype=np.uint8), np.ones((8, 8), np.uint8))
            Image.fromarray(blocks).save(root / "annotations" / split / f"{name}.png")


def write_coco(root: Path) -> None:
    rng = np.random.default_rng(2)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", 4), ("val2017", 2)):
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(1, count + 1):
            noise(rng).save(root / split / f"{number:012d}.jpg")
            images.append({"id": number, "file_name": f"{number:012d}.jpg", "height": 64, "width": 72})
            polygon = [8.0, 8, 48, 8, 48, 40, 8, 40]
            annotations.append(
                {"id": number, "image_id": number, "category_id": 1, "bbox": [8, 8, 40, 32], "area": 1280, "iscrowd": 0}
                | {"segmentation": [polygon]}
            )
        categories = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
        data = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))


def write_kinetics(root: Path) -> None:
    """The published lists, and the videos in folders of classes."""
    rng = np.random.default_rng(3)
    for split, count in (("train", 2), ("val", 1)):
        rows = []
        for label in ("abseiling", "air drumming"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                youtube = f"{split}{label[:2]}{number}".ljust(11, "x")
                write_video(folder / f"{youtube}_000000_000010.mp4", rng)
                rows.append([label, youtube, 0, 10, split])
        with (root / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["label", "youtube_id", "time_start", "time_end", "split"], *rows])


def write_video(path: Path, rng: np.random.Generator, frames: int = 10) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 30)
        for number in range(frames):
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


WRITERS = {"imagenet": write_imagenet, "ade20k": write_ade20k, "coco": write_coco, "kinetics400": write_kinetics}


def words_of(command: str) -> list[str]:
    return shlex.split(command)[1:]


def options_of(words: Sequence[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words if "=" in word and not run_of(word))


def run_of(word: str) -> str:
    """The run that a word names, as the command that trains it does; empty if it names none."""
    found = re.fullmatch(r"(?:\w+:=)?(runs/.*?)(?:/last)?", word)
    return found[1] if found else ""


def config_of(words: Sequence[str]) -> RunConfig:
    config: RunConfig = HOURS["config_of_command"](words)
    return config


OUTPUTS = {given["output"]: words for words in map(words_of, commands()) if "output" in (given := options_of(words))}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands are typed, with the data inside."""
    folder = tmp_path_factory.mktemp("reproduce")
    for name, write in WRITERS.items():
        write(folder / "data" / name)
    return folder


def smaller(sides: str) -> str:
    """The first two of some sizes (of a range its ends), a quarter as large."""
    return ",".join(str(int(side) // SHRINK) for side in re.split("[,:]", sides)[:2])


def little(words: list[str]) -> list[str]:
    """The words of a command with little data, networks, sizes and epochs; a sweep of the runs that are there."""
    given = options_of(words)
    changes = {"data": given["data"].removeprefix("/")}
    if "train" in words:
        changes |= little_run(config_of(words))
    elif words[0] == "sweep":
        changes |= {"sizes": smaller(given["sizes"]), "cost": "false"}
        models = [word for word in words if run_of(word)]
        words = [word for word in words if word in (models[0], models[-1]) or word not in models or is_there(word)]
    else:
        changes["size"] = "64"
    kept = [word for word in words if word.partition("=")[0] not in changes]
    return kept + [f"{name}={value}" for name, value in changes.items()]


def little_run(config: RunConfig) -> dict[str, Any]:
    network = TINY | {
        name: value // SHRINK if name == "img_size" else value for name, value in config.model_args.items()
    }
    options = {
        "epochs": 1, "warmup_epochs": 0, "batch_size": 2, "workers": 0, "device": "cpu", "precision": "float32",
        "progress": False, "drop_path": 0, "max_bad_fraction": 0, "model_args": as_text(network),
        "sizes": ",".join(str(height // SHRINK) for height, _ in config.shapes),
    }  # fmt: skip
    if config.decay == "step":
        options["drops"] = 1
    if config.task == "video":
        options["frames"] = 2
    if head := getattr(config, "head", None):
        options |= {"head_args": as_text(HEADS[head]), "sizes": 64}
    return options


def as_text(pairs: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in pairs.items())


def is_there(word: str) -> bool:
    return Path(run_of(word)).is_dir()


def type_in(words: list[str]) -> None:
    """Run a command in the current folder after those that train what it takes."""
    given = options_of(words)
    wanted = [*words, given.get("init_from", "")]
    typed = little(words)
    for word in wanted:
        if run_of(word) and (word in typed or word == given.get("init_from")) and not is_there(word):
            type_in(OUTPUTS[run_of(word)])
    assert main(typed) == 0, shlex.join(typed)


def form(command: str) -> str:
    """What a command has in common with others that differ in a number, a model's size or a run's name."""
    words = [word for word in words_of(command) if not (run_of(word) or word.startswith(("output=", "init_from=")))]
    return re.sub(r"\d[\d.,:]*", "#", re.sub("tiny|small|base", "*", " ".join(words)))


def by_form() -> list[Any]:
    known: set[str] = set()
    chosen = []
    for command in commands():
        chosen.append(pytest.param(command, marks=pytest.mark.slow) if form(command) in known else command)
        known.add(form(command))
    return chosen


@pytest.mark.parametrize("command", by_form())
def test_a_command_runs_on_little_data(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = words_of(command)
    type_in(words)
    output = Path(options_of(words).get("output", "."))
    if words[0] == "sweep":
        assert all((output / name).is_file() for name in ("sweep.csv", "sweep.png", "report.html"))
    if "train" in words:
        assert all((output / name / "model.safetensors").is_file() for name in ("best", "last"))
        page, ran = config_of(words).to_dict(), yaml.safe_load((output / "config.yaml").read_text())
        changed = {"data", *little_run(config_of(words))}
        assert {name: ran[name] for name in page if name not in changed} == without(page, changed)
        assert ran["model_args"].items() >= without(page["model_args"], {"img_size"}).items()


def without(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def test_what_a_command_takes_is_trained_by_one_above_it() -> None:
    made: set[str] = set()
    for words in map(words_of, commands()):
        given = options_of(words)
        assert {run_of(word) for word in [*words, given.get("init_from", "")] if run_of(word)} <= made, words
        if "output" in given:
            assert given["output"] not in made
            made.add(given["output"])


def test_steps_are_those_of_the_settings() -> None:
    rows = re.findall(r"^\| (`runs/.*?) \|.*?\| ([\d,]+) \|", PAGE.read_text(), re.M)
    patterns = [(pattern, steps) for cell, steps in rows for pattern in re.findall("`(.*?)`", cell)]
    for output, words in OUTPUTS.items():
        if "train" in words:
            config = config_of(words)
            stated = {int(steps.replace(",", "")) for pattern, steps in patterns if fnmatch(output, pattern)}
            assert stated == {HOURS["count_steps"](config, IMAGES[config.data])}, output


def test_hours_are_the_time_of_a_step_times_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["sizes=8", "batch_size=4", "epochs=3", "warmup_epochs=0", "workers=0", "device=cpu", "auto_augment=none"]
    small = as_text({**TINY, "patch_size": 4})
    words = ["train", "resformer_tiny", "data=digits", f"model_args={small}", f"output={tmp_path / 'run'}", *few]
    HOURS["main"](["--timed", "2", "--images", "36001", *words])
    printed = capsys.readouterr().out
    assert "27,000 steps of 4 in 3 epochs" in printed
    seconds = float(re.search(r"([\d.]+) s a step", printed)[1])  # type: ignore[index]
    hours = float(re.search(r"([\d.]+) hours, ", printed)[1])  # type: ignore[index]
    assert hours == pytest.approx(27_000 * seconds / 3600, abs=0.06 + 27_000 * 0.0005 / 3600)
    assert not (tmp_path / "run").exists()
