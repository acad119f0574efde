"""Saved models whose config.json or weights are damaged, where commands take a model."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.data.pictures import encode, noise
from tests.fuzz.core import Failure, Kind, Ran, command, kept
from tests.fuzz.mutators import mutate_bytes, mutate_file, mutate_text, mutate_tree, to_json
from tests.fuzz.runs import OPTIONS, PREFIX, finished, train_words, write_video


@dataclass(frozen=True)
class Saved:
    task: str
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    item: Path
    """A picture or a clip to predict."""


def prepare(folder: Path) -> list[Saved]:
    picture, clip = folder / "a.png", folder / "a.mp4"
    picture.write_bytes(encode(noise(40, 48), "PNG"))
    write_video(clip)
    found = []
    for task in OPTIONS:
        best = finished(folder, task) / "best"
        config = json.loads((best / "config.json").read_text())
        found.append(Saved(task, config, load_file(best / "model.safetensors"), clip if task == "video" else picture))
    return found


def case(rng: random.Random, material: list[Saved]) -> str:
    saved = rng.choice(material)
    folder = Path("model")
    folder.mkdir()
    what = rng.choice(("config", "weights", "weights", "both"))
    config = _config(rng, saved.config) if what != "weights" else json.dumps(saved.config).encode()
    (folder / "config.json").write_bytes(config)
    poisoned = _write_weights(rng, saved.weights, folder / "model.safetensors", what != "config")
    with kept(folder, saved.item):
        ran = _use(rng, saved)
    if poisoned and what == "weights" and ran.code == 0 and "nan" in ran.out:
        raise Failure(f"results that are no numbers\n{ran.out[:2000]}")
    return ran.verdict()


def _config(rng: random.Random, config: dict[str, Any]) -> bytes:
    if rng.random() < 0.8:
        text = to_json(rng, mutate_tree(rng, config))
        return text.encode() if rng.random() < 0.95 else mutate_bytes(rng, text.encode())
    return mutate_text(rng, json.dumps(config, indent=1))


def _write_weights(rng: random.Random, weights: dict[str, torch.Tensor], path: Path, damage: bool) -> bool:
    """Write them, damaged or not; whether they hold numbers that are not finite."""
    weights = dict(weights)
    way = rng.randrange(8) if damage else -1
    name, other = rng.choice(list(weights)), rng.choice(list(weights))
    if way == 0:
        del weights[name]
    elif way == 1:
        weights["more"] = weights[name].clone()
    elif way == 2:
        weights[f"{name}x"] = weights.pop(name)
    elif way == 3:
        weights[name] = weights[name].transpose(0, -1).contiguous() if weights[name].ndim else weights[name][None]
    elif way == 4:
        weights[name] = rng.choice((weights[other].clone(), torch.zeros(0), torch.zeros(()), torch.zeros(3, 3, 3)))
    elif way == 5:
        weights[name] = weights[name].to(rng.choice((torch.float16, torch.float64, torch.int64, torch.bool)))
    elif way == 6 and weights[name].is_floating_point():
        weights[name] = torch.full_like(weights[name], rng.choice((torch.nan, torch.inf, 3e38)))
    save_file(weights, path, {"format": "pt"})
    if way == 7:
        path.write_bytes(mutate_file(rng, path.read_bytes()))
    return way == 6


def _use(rng: random.Random, saved: Saved) -> Ran:
    first, use = PREFIX[saved.task], rng.random()
    if use < 0.7 or (use < 0.8 and not first):
        return command("predict", "model", saved.item, "layout=csv", f"topk={rng.choice((1, 5, 100))}")
    if use < 0.8:
        return command(*first, "test", "model", "size=32")
    if use < 0.85:
        return command("sweep", "model", "sizes=32", "--no-cost", "output=sweep")
    if use < 0.95:
        return command(*train_words(saved.task, epochs=1, init_from="model", output="run"))
    return command(
        "convert", "model", rng.choice(("out.safetensors", "out")), f"to={rng.choice(('anyres', 'published'))}"
    )


KIND = Kind("saved_models", case, prepare, short=0, long=2000, batch=1, megabytes=1000)
