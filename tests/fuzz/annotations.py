"""Damaged datasets: annotations of objects, masks, folders of classes, lists of clips."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from anyres.data import BadImage, rle
from anyres.errors import UserError
from anyres.tasks import TASKS
from anyres.training import load_config
from anyres.training.setup import build_loader
from tests.data.pictures import encode, noise
from tests.fuzz.core import Failure, Kind, check_sentence, command, kept
from tests.fuzz.images import mutate_picture, pictures
from tests.fuzz.mutators import VALUES, WORDS, mutate_bytes, mutate_text, mutate_tree, to_json
from tests.fuzz.runs import OPTIONS, train_words, write_video

HEIGHT, WIDTH = 32, 40
NAMES = (
    *(
        "cat",
        "dog",
        "ä ö",
        "[red]a",
        "foo]",
        "$\\foo$",
        "=1+1",
        "<script>",
        "-x",
        "a,b",
        "a\nb",
        "\x1b[31m",
        "%s",
        "'",
    ),
    *("train", "Train", "val", "VALID", "test", "testing", "images", "labels", ".hidden", "n01440764", "0", "1", "007"),
    *("Icon\r", "\udcff", "x" * 200, "a.png", "__MACOSX"),
)
"""How people and programs call folders and files."""


def prepare(folder: Path) -> dict[str, Any]:
    for number in range(4):
        write_video(folder / f"{number}.mp4", 4 + number)
    return {"clips": [(folder / f"{number}.mp4").read_bytes() for number in range(4)], "pictures": pictures()}


# Whole datasets ------------------------------------------------------------------------------------------------------


def write_coco(rng: random.Random, root: Path, _: dict[str, Any]) -> None:
    """Four pictures, three classes, boxes with polygons, run lengths (both kinds) and keypoints; train and val."""
    mask = np.pad(np.ones((12, 12), dtype=bool), ((8, 12), (10, 18)))
    segments = [[[5.0, 5, 30, 5, 5, 25]], {"size": [HEIGHT, WIDTH], "counts": rle.encode(mask).tolist()}]
    keypoints = [12.0, 10, 2, 15, 12, 1, 0, 0, 0]
    content = {
        "info": {"year": 2026},
        "images": [{"id": n, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH} for n in range(4)],
        "categories": [{"id": n, "name": f"c{n}", "keypoints": ["left", "right", "top"]} for n in (90, 7, 3)],
        "annotations": [
            {
                "id": n,
                "image_id": n % 4,
                "category_id": (90, 7, 3)[n % 3],
                "iscrowd": int(n == 5),
                "area": 99.0,
                "bbox": [5.0, 5.0, 20.0, 18.0],
                "segmentation": segments[n % 2],
                "keypoints": keypoints,
            }
            for n in range(8)
        ],
    }
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        for number in range(4):
            (root / split / f"{number}.png").write_bytes(encode(noise(HEIGHT, WIDTH, number), "PNG"))
        damaged = json.dumps(content).encode()
        if split == "train" or rng.random() < 0.3:
            damaged = _json(rng, content)
        (root / "annotations" / f"instances_{split}.json").write_bytes(damaged)


def _json(rng: random.Random, content: Any) -> bytes:
    way = rng.random()
    if way < 0.75:
        return to_json(
            rng, mutate_tree(rng, content, [*VALUES, 2**53, [1e9] * 4, [0, 0, 1, 1], "9.png"], most=4)
        ).encode()
    text = json.dumps(content, indent=rng.choice((None, 1)))
    return mutate_text(rng, text) if way < 0.9 else mutate_bytes(rng, text.encode())


def write_masks(rng: random.Random, root: Path, material: dict[str, Any]) -> None:
    """Six pictures with masks of three classes, in folders of a split or in one."""
    parts = rng.choice((["training", "validation"], ["train", "val"], [""]))
    marks = rng.choice(("masks", "annotations", "labels"))
    for part in parts:
        for folder in (root / "images" / part, root / marks / part):
            folder.mkdir(parents=True)
        for number in range(6):
            (root / "images" / part / f"{number}.jpg").write_bytes(encode(noise(HEIGHT, WIDTH, number)))
            values = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) // 500 % 3
            data = _mask(rng, values, material) if rng.random() < 0.3 else encode(_grey(values), "PNG")
            (root / marks / part / f"{number}.png").write_bytes(data)
    text = "sky\nroad\ncar\n"
    (root / "classes.txt").write_bytes(mutate_text(rng, text) if rng.random() < 0.3 else text.encode())


def _mask(rng: random.Random, values: np.ndarray, material: dict[str, Any]) -> bytes:
    way = rng.randrange(6)
    if way == 0:
        return mutate_picture(rng, material["pictures"])
    if way == 1:
        return mutate_bytes(rng, encode(_grey(values), "PNG"))
    if way == 2:
        return encode(_grey(values).resize((rng.choice((1, 7, WIDTH * 2)), HEIGHT)), "PNG")
    if way == 3:
        return encode(Image.fromarray((values * 300).astype(np.uint16)), "PNG")
    if way == 4:
        return encode(_grey(values).convert(rng.choice(("RGB", "RGBA", "P", "1", "LA"))), "PNG")
    values = values.copy()
    values[rng.randrange(HEIGHT)] = rng.choice((3, 7, 128, 254, 255))
    return encode(_grey(values), "PNG")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8))


def write_classes(rng: random.Random, root: Path, material: dict[str, Any]) -> None:
    """Pictures in a folder for each class, with or without folders of splits."""
    names = rng.sample(NAMES, rng.randint(1, 4)) if rng.random() < 0.5 else ["cat", "dog"]
    for split in rng.choice((["train", "val"], ["Training", "Testing"], [""])):
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(rng.choice((0, 1, 4, 4, 4))):
                data = encode(noise(HEIGHT, WIDTH, number))
                file = rng.choice(NAMES)[:20] if rng.random() < 0.1 else str(number)
                (folder / f"{file}.jpg").write_bytes(
                    mutate_picture(rng, material["pictures"]) if rng.random() < 0.1 else data
                )


def write_clips(rng: random.Random, root: Path, material: dict[str, Any]) -> None:
    """Clips by a list of paths and classes, by Kinetics' list, or in folders of classes."""
    root.mkdir(parents=True)
    kind = rng.choice(("list", "list", "kinetics", "folders"))
    for split in ("train", "val"):
        rows: list[list[Any]] = []
        for number, data in enumerate(material["clips"]):
            name = f"{split}{number}_000001_000005" if kind == "kinetics" else f"{split}{number}"
            place = root / split / ("ab"[number % 2] if kind == "folders" else "") / f"{name}.mp4"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(mutate_bytes(rng, data) if rng.random() < 0.15 else data)
            if kind == "list":
                rows.append([place.relative_to(root), number % 2])
            else:
                rows.append(["ab"[number % 2], f"{split}{number}", 1, 5, split])
        if kind == "folders":
            continue
        table = io.StringIO()
        header = [["label", "youtube_id", "time_start", "time_end", "split"]] if kind == "kinetics" else []
        csv.writer(table, delimiter=rng.choice(", ") if kind == "list" else ",", lineterminator="\n").writerows(
            [*header, *rows]
        )
        text = table.getvalue()
        (root / f"{split}.csv").write_bytes(
            mutate_text(rng, text, (*WORDS, "a.mp4,99999999999", "a.mp4 -1")) if rng.random() < 0.7 else text.encode()
        )


def disturb(rng: random.Random, root: Path) -> None:
    """What happens to folders: files that go, come, get other names, links that lead in circles."""
    for _ in range(rng.choice((0, 0, 1, 2))):
        inside = sorted(path for path in root.rglob("*") if not path.is_symlink())
        if not inside:
            return
        path = rng.choice(inside)
        way = rng.randrange(7)
        if way == 0:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif way == 1 and not (path.parent / (name := rng.choice(NAMES))).exists():
            path.rename(path.parent / name)
        elif way == 2:
            loop = (path if path.is_dir() else path.parent) / "loop"
            loop.unlink(missing_ok=True)
            loop.symlink_to(rng.choice((".", "..", "loop", "/nowhere")))
        elif way == 3 and path.is_dir():
            (path / rng.choice(NAMES)[:50]).mkdir(exist_ok=True)
        elif way == 4 and path.is_dir():
            (path / rng.choice(("Thumbs.db", ".DS_Store", "readme.txt", "._0.png", "x.json"))).write_bytes(b"x")
        elif way == 5 and path.is_file():
            path.write_bytes(b"")
        elif way == 6 and path.is_file():
            path.unlink()
            path.mkdir() if rng.random() < 0.5 else os.mkfifo(path)


# Cases ----------------------------------------------------------------------------------------------------------------

WRITERS: dict[str, tuple[str, Callable[[random.Random, Path, dict[str, Any]], None]]] = {
    "coco": ("detection", write_coco),
    "masks": ("segmentation", write_masks),
    "classes": ("classification", write_classes),
    "clips": ("video", write_clips),
}


def case(rng: random.Random, material: dict[str, Any]) -> str:
    task, write = WRITERS[rng.choice(list(WRITERS))]
    root = Path("data")
    write(rng, root, material)
    disturb(rng, root)
    options = {
        "data": "data",
        "batch_size": 2,
        "epoch_size": None,
        "epochs": 1,
        "max_bad_fraction": rng.choice((0.1, 1.0)),
    }
    if task == "segmentation":
        options |= {"num_classes": rng.choice((None, 3, 3, 2, 150))}
    if task == "detection":
        options |= {
            "keep_empty": rng.random() < 0.3,
            "head": rng.choice(("mask_rcnn", "mask_rcnn", "faster_rcnn", "keypoint_rcnn")),
        }
    with kept(root):
        if rng.random() < 0.3:
            return command(*train_words(task, output="run", **options)).verdict()
        return _load(task, {**OPTIONS[task], **options})


def _load(task: str, options: dict[str, Any]) -> str:
    """Open and read the data as training does, without training."""
    process: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    try:
        config = load_config(options, task)
        work = TASKS[task]
        source = work.open_source(config, "train")
        test = work.open_source(config, "val", like=source)
        if len(source.label_names) < 2 and task == "classification":
            raise Failure(f"one class: {source.label_names}")
        loader = build_loader(config, process, source, work.views(config, source))
        for epoch in range(2):
            for _ in loader.epoch(epoch):
                pass
        for index in range(len(test)):
            test.item(index)
    except (UserError, OSError, BadImage) as error:
        check_sentence(error)
        return "refused"
    return "worked"


KIND = Kind("annotations", case, prepare, short=0, long=2000, batch=10, megabytes=800)
