"""Damaged recipes: options by name, of the wrong kind, absurd, in broken YAML."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from anyres.errors import UserError
from anyres.training import load_config
from anyres.training.recipe import RECIPES
from tests.fuzz.core import Failure, Kind, check_sentence, command
from tests.fuzz.mutators import VALUES, WORDS, mutate_file, mutate_text, mutate_tree
from tests.fuzz.runs import OPTIONS, PREFIX, until_work

_CLEVER = (
    "a: &a [1, 1]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "sizes: " + "[" * 3000 + "]" * 3000,
    "model_args: " + "{a: " * 3000 + "}" * 3000,
    "model: !!python/object/apply:os.system ['touch canary']",
    "model: !!python/name:os.system",
    "a: &a {b: *a}",
    "model_args: &a {<<: *a}",
    "<<: {epochs: 3}",
    "<<: [1]",
    "? [1, 2]\n: 3",
    "? {a: 1}\n: 3",
    "1: 2",
    "null: 3",
    "epochs: 0b101",
    "epochs: 190:20:30",
    "epochs: 2026-01-01",
    "epochs: !!binary aGVsbG8=",
    "epochs: !!set {a}",
    "epochs: !!float nan",
    "epochs: 1\nepochs: 2",
    "--- {}\n--- {}",
    "%YAML 9.9\n---\nepochs: 1",
    "epochs: " + "9" * 5000,
    "epochs: 1e" + "9" * 400,
    "- epochs",
    "\x00",
)


def case(rng: random.Random, published: dict[str, list[dict[str, Any]]]) -> str:
    task = rng.choice(list(OPTIONS))
    recipe = OPTIONS[task] if rng.random() < 0.6 else rng.choice(published[task])
    path = Path(rng.choice(("r.yaml", "r.yaml", "r.yml")))
    path.write_bytes(_recipe(rng, recipe))
    verdict = _load(path, task) if rng.random() < 0.5 else _train(path, task)
    if Path("canary").exists():
        raise Failure("code from the file was run")
    return verdict


def _recipe(rng: random.Random, recipe: dict[str, Any]) -> bytes:
    way = rng.random()
    if way < 0.55:
        changed = mutate_tree(rng, recipe, [*VALUES, *(word for word in WORDS if word.isprintable())], most=2)
        try:
            text = yaml.safe_dump(changed, sort_keys=False, allow_unicode=rng.random() < 0.5)
        except RecursionError:  # PyYAML cannot write what is nested this deeply
            text = "epochs: " + "[" * 3000
        return text.encode(errors="surrogatepass")
    text = yaml.safe_dump(recipe, sort_keys=False)
    if way < 0.7:
        return f"{text if rng.random() < 0.5 else ''}{rng.choice(_CLEVER)}\n".encode()
    return mutate_text(rng, text) if way < 0.9 else mutate_file(rng, text.encode())


def _load(path: Path, task: str) -> str:
    try:
        if not load_config(path, task).shapes:
            raise Failure("no sizes")
    except (UserError, OSError) as error:
        check_sentence(error)
        return "refused"
    return "worked"


def _train(path: Path, task: str) -> str:
    words = [*PREFIX[task], "train", "--recipe", str(path), "output=run", "data=digits", "--no-progress", "workers=0"]
    return until_work(lambda: command(*words))[1]


def _published(_: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        task: [yaml.safe_load(path.read_text()) for path in sorted((RECIPES / task).glob("*.yaml"))] for task in OPTIONS
    }


KIND = Kind("recipes", case, _published, short=100, long=2000, batch=5, megabytes=1500)
