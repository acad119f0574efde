"""Texts that others wrote: regular files, bounded, in UTF-8."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anyres.data import BadImage, load_image
from anyres.data.classes import read_names
from anyres.data.coco import Coco
from anyres.data.segmentation import class_names
from anyres.data.video_sources import open_video_source
from anyres.errors import UserError
from anyres.io.parsing import read_json, read_text, read_yaml

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "text": ("a.txt", lambda folder: read_text(folder / "a.txt")),
    "json": ("a.json", lambda folder: read_json(folder / "a.json")),
    "yaml": ("a.yaml", lambda folder: read_yaml(folder / "a.yaml")),
    "class names": ("names.txt", lambda folder: read_names(folder / "names.txt")),
    "classes of masks": ("classes.txt", class_names),
    "annotations": ("train/_annotations.coco.json", lambda folder: Coco(str(folder), "train")),
    "list of videos": ("train.csv", lambda folder: open_video_source(folder / "train.csv", "train")),
}


@pytest.mark.parametrize("reader", READERS)
def test_another_encoding_is_a_sentence(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes("große".encode("latin-1"))
    with pytest.raises(UserError, match=r"not a text in UTF-8 \(at byte 3\)"):
        read(tmp_path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("reader", READERS)
def test_nobody_waits_for_a_pipe(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    try:
        found = read(tmp_path)
    except (UserError, FileNotFoundError):
        return
    assert found == []  # as where no classes are named


@pytest.mark.timeout(30)
def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadImage, match="no regular file"):
        load_image(tmp_path / "a.png", "a.png")


def test_size_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 3000)
    with pytest.raises(UserError, match="more than 2 KiB"):
        read_text(tmp_path / "a.txt", 2048)
