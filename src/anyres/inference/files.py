"""Find input files, predict them, and draw results to files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import tee
from pathlib import Path
from typing import Any

from anyres.data import Item, list_images
from anyres.data.decode import with_depth
from anyres.data.listing import EXTENSIONS
from anyres.data.video_sources import EXTENSIONS as VIDEO_EXTENSIONS
from anyres.errors import UserError
from anyres.extras import require
from anyres.inference.identity import fingerprint, own_version
from anyres.inference.predictor import Predictor
from anyres.inference.unfinished import Wanted
from anyres.io.files import atomic_write, check_files
from anyres.tasks.base import Task
from anyres.tasks.results import Result


def find_files(inputs: Sequence[str | Path], kind: str = "image") -> Iterator[str]:
    """Yield the paths of the image (or video) files among the inputs and inside their folders.

    Raises:
        FileNotFoundError: if an input does not exist.
        UserError: if a folder contains no such files.
    """
    if kind == "video":
        require("av")
    extensions = EXTENSIONS if kind == "image" else VIDEO_EXTENSIONS
    for path in map(Path, inputs):
        if path.is_dir():
            inside = list_images(path, extensions)
            if not inside:
                raise UserError(f"{path} contains no {kind}s: give {kind} files or a folder with some.")
            yield from (str(path / name) for name in inside)
        elif path.exists():
            yield str(path)
        else:
            raise FileNotFoundError(f"There is no file or folder {path}: check the path.")


def wanted_files(inputs: Sequence[str | Path], kind: str, folder: Path | None = None) -> Iterator[Wanted]:
    """Return the files of `find_files`, with the names of the pictures to draw into `folder`, if one is given.

    Raises UserError as `find_files` and `check_folder`.
    """
    paths = find_files(inputs, kind)
    if folder is None:
        return map(Wanted, paths)
    known = list(paths)
    check_folder(folder, known)
    return map(Wanted, known, picture_names(known))


def picture_names(names: Iterable[str]) -> list[str]:
    """Return the file names of the drawings: the stem of each name and .png, with a number added to repeated ones."""
    taken: dict[str, None] = {}
    last: dict[str, int] = {}
    for stem in (Path(name).stem for name in names):
        name, number = stem, last.get(stem, 1)
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken[name] = None
        last[stem] = number
    return [f"{name}.png" for name in taken]


def check_folder(folder: Path, files: Sequence[str]) -> None:
    """Check that the results of `files` can be drawn into `folder`.

    Raises UserError if a file that anyres did not write would be overwritten, or if one of the `files` is in `folder`.
    """
    check_files(folder, "picture", picture_names(files))
    home = folder.resolve()
    inside = next((file for file in map(Path, files) if home in (file.parent.resolve(), file.resolve().parent)), None)
    if inside is not None:
        raise UserError(f"{folder} is the folder of {inside}: choose another folder for the drawn predictions.")


def predict_files(
    predictor: Predictor, todo: Iterable[tuple[int, Wanted]], folder: Path
) -> Iterator[tuple[int, Result, Path | None]]:
    """Yield the place of each file, its result, and the path of the PNG drawn into `folder`.

    There is no path if no picture is wanted, or if the file cannot be read. Files are taken as they are needed.
    """
    ahead, behind = tee(todo)
    items = (_item(wanted, predictor.bit_depth) for _, wanted in ahead)
    for (place, wanted), result in zip(behind, predictor.stream(items), strict=True):
        item = _item(wanted, predictor.bit_depth)
        yield place, result, _draw(result, item, folder / wanted.picture) if wanted.picture else None


def draw_results(predictor: Predictor, items: Sequence[Item], folder: Path) -> Iterator[tuple[Result, Path | None]]:
    """Yield the result of each item and the path of the PNG drawn into `folder` (None if the item cannot be read).

    Call `check_folder` first.
    """
    names = picture_names(item.name for item in items)
    for item, name, result in zip(items, names, predictor.stream(items), strict=True):
        yield result, _draw(result, item, folder / name)


def _item(wanted: Wanted, bit_depth: int | None) -> Item:
    return Item(wanted.path, with_depth(Path(wanted.path), bit_depth), None)


def _draw(result: Result, item: Item, path: Path) -> Path | None:
    if result.problem:
        return None
    with atomic_write(path, "picture") as temporary:
        result.draw(item).save(temporary, format="PNG")
    return path


def settings_of(predictor: Predictor, inputs: Sequence[str], size: str | None, folder: Path | None) -> dict[str, Any]:
    """Return what decides the rows of a table of predictions, for `UnfinishedTable.opened`."""
    return {
        "files": [os.path.abspath(path) for path in inputs],
        "model": fingerprint(predictor.model),
        "classes": predictor.config.label_names,
        "size": size,
        "preparation": repr(predictor.transform),
        "bit_depth": predictor.bit_depth,
        "precision": predictor.precision,
        **predictor.options.model_dump(mode="json"),
        "pictures": folder and os.path.abspath(folder),
        "anyres": own_version(),
    }


def columns_of(task: Task, draws: bool) -> dict[str, type]:
    """Return the columns of a table of predictions: title → type."""
    return {"image": str, **task.columns, **({"picture": str} if draws else {}), "problem": str}


def rows_of(result: Result, picture: Path | None, columns: Mapping[str, type], typed: bool) -> list[list[Any]]:
    """Return the rows of a result in the columns of `columns_of`: at least one, so that no file is left out."""
    found = result.values() if typed else result.rows()
    drawn = [None if picture is None else str(picture)] if "picture" in columns else []
    last = [*drawn, result.problem or None]
    nothing = [None] * (len(columns) - 1 - len(last))
    return [[result.name, *row, *last] for row in found or [nothing]]
