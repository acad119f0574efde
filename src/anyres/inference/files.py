"""Find input files, and draw results to files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from anyres.data import Item, list_images
from anyres.data.listing import EXTENSIONS
from anyres.data.video_sources import EXTENSIONS as VIDEO_EXTENSIONS
from anyres.errors import UserError
from anyres.extras import require
from anyres.inference.predictor import Predictor
from anyres.io.files import atomic_write, check_files
from anyres.tasks.results import Result


def find_files(inputs: Sequence[str | Path], kind: str = "image") -> list[Path]:
    """Return the image (or video) files among the inputs and inside their folders.

    Raises:
        FileNotFoundError: if an input does not exist.
        UserError: if a folder contains no such files.
    """
    if kind == "video":
        require("av")
    extensions = EXTENSIONS if kind == "image" else VIDEO_EXTENSIONS
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            inside = [path / name for name in list_images(path, extensions)]
            if not inside:
                raise UserError(f"{path} contains no {kind}s: give {kind} files or a folder with some.")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"There is no file or folder {path}: check the path.")
    return files


def picture_names(names: Iterable[str]) -> list[str]:
    """Return the file names of the drawings: the stem of each name and .png, with a number added to repeated ones."""
    taken: dict[str, None] = {}
    for stem in (Path(name).stem for name in names):
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken[name] = None
    return [f"{name}.png" for name in taken]


def check_folder(folder: Path, files: Sequence[Path]) -> None:
    """Check that the results of `files` can be drawn into `folder`.

    Raises UserError if a file that anyres did not write would be overwritten, or if one of the `files` is in `folder`.
    """
    check_files(folder, "picture", picture_names(map(str, files)))
    home = folder.resolve()
    inside = next((file for file in files if home in (file.parent.resolve(), file.resolve().parent)), None)
    if inside is not None:
        raise UserError(f"{folder} is the folder of {inside}: choose another folder for the drawn predictions.")


def draw_results(predictor: Predictor, items: Sequence[Item], folder: Path) -> Iterator[tuple[Result, Path | None]]:
    """Yield the result of each item and the path of the PNG drawn into `folder` (None if the item cannot be read).

    Call `check_folder` first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = picture_names(item.name for item in items)
    for item, name, result in zip(items, names, predictor.stream(items), strict=True):
        if result.problem:
            yield result, None
            continue
        with atomic_write(folder / name, "picture") as temporary:
            result.draw(item).save(temporary, format="PNG")
        yield result, folder / name
