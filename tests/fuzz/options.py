"""Command lines of every command with strange values, and with words missing, repeated and misspelt."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from anyres.cli import demo
from anyres.cli.arguments import Command, Group, more_options, own_options
from anyres.cli.commands import COMMANDS
from tests.data.pictures import encode, noise
from tests.fuzz.core import Kind, command, kept
from tests.fuzz.mutators import NUMBERS, WORDS
from tests.fuzz.runs import OPTIONS, PREFIX, Began, finished, train_words, until_work, write_video

PATHS = (
    *(
        "a.png",
        "a.mp4",
        "pictures",
        "run",
        "run/best",
        "theirs",
        "theirs/thesis.txt",
        "new",
        "new/x",
        "no/such",
        ".",
        "..",
    ),
    *("out.csv", "out.safetensors", "out.pth", "/dev/null", "/dev/full", "/proc/self/x", "a.png/x", "~", "theirs/out"),
    *("run/metrics.csv", "run/config.yaml", "run/best/model.safetensors", "pictures/0.png", "é/ü", "x" * 300),
)

FOREIGN = (
    *("thesis.txt", "config.json", "model.safetensors", "README.md", "config.yaml", "metrics.csv", "summary.json"),
    *("sweep.csv", "sweep.png", "pareto.png", "report.html", "a.png", "0.png", "best/thesis.txt", "last/config.json"),
    *(
        "state/notes.txt",
        "state/step_000000001_000000/notes.txt",
        "tensorboard/mine",
        "report/x",
        "pictures/x",
        "out/x",
    ),
    *(".best.old/x", ".theirs.old/x", ".config.x.tmp.yaml", "digits/best/x"),
)
"""Files of somebody else in the folder theirs, some with names that we write, too."""


@dataclass(frozen=True)
class Material:
    folder: Path
    """What every case finds in its own folder: pictures and a clip."""
    runs: dict[str, Path]
    hints: dict[str, dict[str, Any]]
    """Type of every option, by command and name."""


def prepare(folder: Path) -> Material:
    runs = {task: finished(folder, task) for task in OPTIONS}
    (folder / "a.png").write_bytes(encode(noise(40, 48), "PNG"))
    write_video(folder / "a.mp4")
    for number in range(3):
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "pictures" / f"{number}.png").write_bytes(encode(noise(32, 32, number), "PNG"))
    return Material(folder, runs, {" ".join(words): _hints(function) for words, function in Group("", COMMANDS).walk()})


def _hints(function: Command) -> dict[str, Any]:
    fields = {**own_options(function).model_fields, **more_options(function).model_fields}
    return {name: field.annotation for name, field in fields.items() if not field.is_required()}


def case(rng: random.Random, material: Material) -> str:
    task = rng.choice(list(OPTIONS))
    shutil.copytree(material.folder, ".", dirs_exist_ok=True)
    shutil.copytree(material.runs[task], "run")
    command_name, words = _base(rng, task)
    words = _disturb(rng, command_name, words, material.hints[command_name])
    for name in rng.sample(FOREIGN, rng.randint(1, 4)):
        Path("theirs", name).parent.mkdir(parents=True, exist_ok=True)
        Path("theirs", name).write_text("months of work")
    demo.ProcessPoolExecutor = no_processes  # type: ignore[misc, assignment]  # this process has no others
    with kept(Path("theirs"), Path("a.png"), Path("a.mp4"), Path("pictures")):
        return until_work(lambda: command(*words), seconds=rng.choice((0, 0, 0, 4)))[1]


def no_processes(*_: Any) -> None:
    """In the place of the demos' pool, whose processes would run for minutes."""
    raise Began


def _base(rng: random.Random, task: str) -> tuple[str, list[str]]:
    """A command that works: (its name, words)."""
    first, item = PREFIX[task], "a.mp4" if task == "video" else "a.png"
    commands: list[list[str]] = [
        *[train_words(task, output=rng.choice(("new", "run", "theirs", "theirs/out")), epochs=1)] * 5,
        *[["predict", "run", rng.choice((item, "pictures"))]] * 3,
        *[
            [
                "sweep",
                "run",
                "sizes=32,24x40",
                rng.choice(("--no-cost", "--cost")),
                f"output={rng.choice(('new', 'theirs'))}",
            ]
        ]
        * 2,
        [*first, "test", "run", "size=32"] if first else ["info", "deit_tiny", "sizes=32"],
        ["models"],
        ["models", "deit*"],
        ["info", "pvt_v2_b0", "sizes=32"],
        ["convert", "run/best", rng.choice(("out.safetensors", "out.pth", "new", "theirs"))],
        ["convert", "run/best/model.safetensors", "out.pth", "model=pvt_v2_b0"],
        [*first, "demo", f"output={rng.choice(('new', 'theirs'))}", "epochs=1"],
    ]
    words = rng.choice(commands)
    count = 2 if words[0] in ("segment", "detect", "video") else 1
    return " ".join(words[:count]), words


def _disturb(rng: random.Random, name: str, words: list[str], hints: dict[str, Any]) -> list[str]:
    words = list(words)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        way = rng.randrange(10)
        at = rng.randrange(len(words))
        if way < 7 and hints:
            option = rng.choice(list(hints))
            words += _written(rng, option, _value(rng, option, hints[option]), hints[option])
        elif way == 7:
            del words[at]
        elif way == 8:
            words[at] = rng.choice(
                (*WORDS, *PATHS, words[at].upper(), words[at][:-1], f"--{words[at]}", words[at].replace("=", " "))
            )
        else:
            words.insert(at, rng.choice((*WORDS, *PATHS, *words, "--help", "--version")))
        words = words or [name]
    return [word for word in words if "\0" not in word]


def _written(rng: random.Random, option: str, value: str, hint: Any) -> list[str]:
    dashed = option.replace("_", "-")
    if hint is bool and rng.random() < 0.7:
        return [rng.choice((f"--{dashed}", f"--no-{dashed}", f"{option}=false"))]
    return rng.choice(([f"{option}={value}"], [f"--{dashed}={value}"], [f"--{dashed}", value]))


def _value(rng: random.Random, option: str, hint: Any) -> str:
    """Right for the option's type, nearly right, or anything."""
    way = rng.random()
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    kind = kinds[0] if kinds and get_origin(hint) is not Literal and get_origin(hint) is not list else hint
    if option in (
        "output",
        "pictures",
        "results",
        "data",
        "val_data",
        "init_from",
        "recipe",
        "teacher",
        "teacher_weights",
    ):
        return (
            rng.choice((*PATHS, *WORDS))
            if way < 0.9
            else rng.choice(("digits", "hf:x", "wds:x", "hf-stream:x/y", "timm:x"))
        )
    if way < 0.3:
        return rng.choice(WORDS)
    if get_origin(kind) is Literal:
        return rng.choice([*map(str, get_args(kind)), "none", "x"])
    if kind is int:
        return str(rng.choice((*NUMBERS, -7, 10**18)))
    if kind is float:
        return str(rng.choice((*NUMBERS, 0.5, 0.999, 1.001, -0.5, 1e-30, 1e-320, 1e30, 1e308, "inf", "nan")))
    if kind is dict or get_origin(kind) is dict:
        return _pairs(rng)
    if get_origin(kind) is list:
        return ",".join(str(rng.choice((*NUMBERS[:12], *WORDS[-16:], 0.5, 24, 32))) for _ in range(rng.randint(1, 4)))
    return rng.choice(
        ("deit_tiny", "pvt_v2_b0", "resformer_tinny", "cpu", "auto", "cuda:9", "tpu", "adamw", "sgd", "32", "bilinear")
    )


def _pairs(rng: random.Random) -> str:
    names = (
        "embed_dim",
        "depth",
        "num_heads",
        "patch_size",
        "embed_dims",
        "depths",
        "img_size",
        "channels",
        "in_chans",
        "mlp_ratio",
    )
    values = {
        rng.choice((*names, *WORDS[:30])): rng.choice((*NUMBERS[:8], 0.5, -3, None, True, "x", [1, 2], [], {"a": 1}))
        for _ in range(rng.randint(1, 3))
    }
    return json.dumps(values) if rng.random() < 0.5 else ",".join(f"{name}={value}" for name, value in values.items())


KIND = Kind("options", case, prepare, short=0, long=2000, batch=1, megabytes=1500)
