"""Runs that were interrupted and then damaged: the state, the tables, the recipe, the weights beside them."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from anyres.io import files
from tests.fuzz.core import Failure, Kind, command, in_child, kept
from tests.fuzz.mutators import mutate_file, mutate_text, mutate_tree
from tests.fuzz.runs import OPTIONS, PREFIX, Outcome, finished, interrupted, train_words

TEXTS = ("metrics.csv", "summary.json", "config.yaml")


@dataclass(frozen=True)
class Interrupted:
    task: str
    folder: Path
    """Stopped in its second epoch, with two states."""
    whole: Outcome
    """What comes of it when nothing is damaged."""


def prepare(folder: Path) -> list[Interrupted]:
    found = []
    for task in OPTIONS:
        whole = Outcome.of(finished(folder, task))
        assert in_child(partial(interrupted, task, folder / task, after=4)) == 0
        found.append(Interrupted(task, folder / task, whole))
    return found


def case(rng: random.Random, material: list[Interrupted]) -> str:
    chosen = rng.choice(material)
    run = Path("run")
    shutil.copytree(chosen.folder, run)
    (run / "thesis").mkdir()
    for place in (run, run / "thesis"):
        (place / "notes.txt").write_text("months of work")
    newest = max((run / "state").iterdir())
    what = rng.choice(("bytes", "bytes", "signed", "content", "both", "texts", "weights", "parts"))
    if what in ("bytes", "both"):
        for state in (run / "state").iterdir() if what == "both" else [newest]:
            _damage(rng, state / "state.pt")
    elif what in ("content", "signed"):  # as if anyres had written it
        if what == "signed":
            _damage(rng, newest / "state.pt")
        else:
            content = torch.load(newest / "state.pt", weights_only=True)
            torch.save(mutate_tree(rng, content, most=2), newest / "state.pt")
        files.adopt(newest, "state", ["state.pt"])
    elif what == "texts":
        _damage(rng, run / rng.choice(TEXTS))
    elif what == "weights":
        _damage(rng, rng.choice(sorted(path for path in run.glob("*/*") if path.suffix in (".safetensors", ".json"))))
    else:
        _lose_parts(rng, run)
    with kept(run / "notes.txt", run / "thesis"):
        return _read(rng, run) if rng.random() < 0.2 else _resume(rng, chosen, run, what)


def _damage(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    text = path.suffix in (".csv", ".json", ".yaml") and rng.random() < 0.7
    path.write_bytes(mutate_text(rng, data.decode()) if text else mutate_file(rng, data))


def _lose_parts(rng: random.Random, run: Path) -> None:
    """What people remove, add and move by hand."""
    for _ in range(rng.randint(1, 3)):
        inside = sorted(path for path in run.rglob("*") if path.name not in ("notes.txt", "thesis"))
        path = rng.choice(inside)
        way = rng.randrange(5)
        if way == 0 or not path.exists():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        elif way == 1:
            path.rename(path.with_name(f"{path.name}_old"))
        elif way == 2 and path.is_file():
            path.unlink()
            path.mkdir()
        elif way == 3:
            (run / "state" / rng.choice(("step_999999999_999999", "step_x", "step_", "x"))).mkdir(
                parents=True, exist_ok=True
            )
        elif path.is_dir():
            (path / f".{path.name}.old").mkdir(exist_ok=True)


def _read(rng: random.Random, run: Path) -> str:
    """Readers never write, whatever they find."""
    model = rng.choice(("run", "run/last", "run/last_ema"))
    with kept(run):
        return command("sweep", model, "sizes=32", "--no-cost", "output=sweep").verdict()


def _resume(rng: random.Random, chosen: Interrupted, run: Path, what: str) -> str:
    words = train_words(chosen.task, output=run, resume=rng.choice(("auto", "auto", "yes")))
    if what == "texts" and rng.random() < 0.5:
        words = [*PREFIX[chosen.task], "train", "--recipe", "run/config.yaml", "output=run", "--no-progress"]
    verdict = command(*words).verdict()
    if what == "bytes" and verdict != "worked":
        raise Failure("a damaged newest state did not give way to the one before")
    if verdict == "worked" and what in ("bytes", "both", "weights"):
        chosen.whole.check(run)
    return verdict


KIND = Kind("run_states", case, prepare, short=0, long=2000, batch=1, megabytes=1000, seconds=60)
