"""Top classes of image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from anyres.data import BadImage, Item, evaluation_views, list_images, normalize, to_batch
from anyres.data.decode import EXTENSIONS, with_depth
from anyres.data.video_sources import EXTENSIONS as VIDEO_EXTENSIONS
from anyres.errors import UserError
from anyres.extras import require
from anyres.inference.finite import check_outputs, check_weights
from anyres.inference.preparation import default_size, label_names, preparation_for, tell_borrowed


class Prediction(NamedTuple):
    """The best classes of one image, most probable first; or the reason why there are none."""

    file: Path
    labels: list[str]
    probabilities: list[float]
    problem: str = ""


def find_files(inputs: Sequence[str | Path], kind: str = "image") -> list[Path]:
    """Image (or video) files: those given, and those below the folders given. Errors: FileNotFoundError, UserError for
    an empty folder."""
    if kind == "video":
        require("av")
    extensions = EXTENSIONS if kind == "image" else VIDEO_EXTENSIONS
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            inside = [path / name for name in list_images(path, extensions)]
            if not inside:
                raise UserError(f"{path} holds no {kind}s: give {kind} files or a folder with some.")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise FileNotFoundError(f"There is no file or folder {path}: check the path.")
    return files


def predict(
    model: nn.Module,
    files: Sequence[Path],
    size: tuple[int, int] | None = None,
    topk: int = 5,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    bit_depth: int | None = None,
) -> Iterator[Prediction]:
    """Classify image files at `size` (height, width), prepared as in evaluation; in the order given. `bit_depth` is
    that of files of more than 8 bits, where it has to be told.

    A file that cannot be read gives a `Prediction` with its `problem` and no labels. Raises UserError for weights or
    logits that are not finite.
    """
    check_weights(model)
    size = size or default_size(model)
    tell_borrowed(model)
    way = preparation_for(model)
    names = label_names(model)
    model = model.to(device).eval()
    for start in range(0, len(files), batch_size):
        chunk = files[start : start + batch_size]
        views, problems = {}, {}
        for file in chunk:
            try:
                item = Item(str(file), with_depth(file, bit_depth), 0)
                views[file] = evaluation_views(item, [size], way.in_chans, way.crop_pct, way.interpolation)[0]
            except BadImage as bad:
                problems[file] = bad.reason
        best: dict[Path, tuple[list[int], list[float]]] = {}
        if views:
            batch = normalize(to_batch(list(views.values())), way.mean, way.std)
            with torch.inference_mode():
                logits = model(batch.to(device)).float()
            check_outputs(model, bool(logits.isfinite().all()), ", ".join(map(str, views)))
            top = logits.softmax(-1)
            values, indices = top.topk(min(topk, top.shape[-1]))
            best = dict(zip(views, zip(indices.tolist(), values.tolist(), strict=True), strict=True))
        for file in chunk:
            if file in problems:
                yield Prediction(file, [], [], problems[file])
            else:
                indices, values = best[file]
                yield Prediction(file, [names[i] if i < len(names) else str(i) for i in indices], values)
