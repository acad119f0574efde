"""Run a model of any task on images or clips.

Items are decoded and resized by the task's eval transform, batched, run through the network and turned into `Result`s
at the size of the original. Predictions, sweeps, demos and validation in training all use this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from anyres.allocator import keep_memory
from anyres.data import BadImage, Item
from anyres.data.config import DataConfig
from anyres.data.decode import Data, with_depth
from anyres.data.samples import EvalBatch, prepare_batches
from anyres.data.schedule import parse_sizes
from anyres.errors import UserError
from anyres.inference.modelspec import open_model
from anyres.inference.precision import precision_context
from anyres.shapes import Size
from anyres.tasks import task_of
from anyres.tasks.finite import check_weights
from anyres.tasks.results import Result, Unreadable

Input = str | Path | bytes | Image.Image | np.ndarray | Tensor
"""A file, its bytes, a PIL image, or pixels.

Pixels are an array (H, W) or (H, W, 3) of uint8, or a tensor (C, H, W) of uint8 or of floats from 0 to 1. Clips are an
array (T, H, W, 3) or a tensor (T, C, H, W).
"""


class Predictor:
    """Runs a network on inputs of any size.

    >>> predictor = Predictor("runs/digits", size=96)
    >>> predictor("photo.jpg").labels
    >>> [result.rows() for result in predictor(["a.png", Image.open("b.jpg")])]

    Args:
        model: a model, or any form that the command line accepts: a run folder, a saved model, `hf-hub:OWNER/NAME`, a
            weights file or a model name.
        size: input size as (height, width), a side, or "HEIGHTxWIDTH"; by default the model's largest training size.
        names: a file of class names to use instead of the model's own.
        device: "auto" (CUDA if available), "cpu", "cuda", …
        precision: "float32", or "bfloat16" or "float16" under autocast.
        batch_size: items per batch; by default that of the task.
        bit_depth: bits per channel of images with more than 8 bits, if the files do not say.
        source: an open data source that supplies whatever the model's data config lacks.
        options: test options of the task, such as `topk`, `threshold`, `scales` or `flip`.

    Raises:
        UserError: if the size is below the model's minimum, an option does not exist, or weights or outputs are not
            finite.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        size: Size | int | str | None = None,
        *,
        names: str | None = None,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        batch_size: int | None = None,
        bit_depth: int | None = None,
        source: Any = None,
        **options: Any,
    ) -> None:
        keep_memory()
        self.model: Any = model if isinstance(model, nn.Module) else open_model(str(model), names)[1]
        self.task = task_of(self.model)
        self.config = DataConfig.of(self.model, source)
        self.size = self.config.size if size is None else read_size(size)
        self.config.check_size(self.size)
        self.options = self.task.test_options(**options)
        self.transform = self.task.transform(self.config, self.size, self.options)
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.precision = precision
        self.batch_size = batch_size or self.task.test_batch_size
        self.bit_depth = bit_depth
        check_weights(self.model)

    def __call__(self, inputs: Input | Sequence[Input]) -> Any:
        """Return a `Result` for a single input, or a list of them for several inputs, in the same order.

        Raises BadImage if a single input cannot be read; among several, it gives a result with a `problem`.
        """
        if isinstance(inputs, str | Path | bytes | Image.Image | np.ndarray | Tensor):
            item = self._item(inputs, 0)
            result = next(self.stream([item]))
            if result.problem:
                raise BadImage(item.name, result.problem)
            return result
        return list(self.stream(self._item(each, number) for number, each in enumerate(inputs)))

    def stream(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield the result of each item, in order. Labels are ignored, and only one batch is in memory at a time."""
        items = iter(items)
        self.config.tell_borrowed()
        with self.running():
            while chunk := [item._replace(label=None) for item in islice(items, self.batch_size)]:
                yield from self._results(chunk)

    def _results(self, chunk: list[Item]) -> list[Result]:
        batches, bad = prepare_batches(self.transform, chunk)
        found: dict[int, Result] = {place: Unreadable(chunk[place].name, error.reason) for place, error in bad.items()}
        for batch in batches:
            with torch.inference_mode():
                results = self.task.results(self.config, self.forward(batch), batch, self.options)
            found |= zip(batch.rows, results, strict=True)
        return [found[place] for place in range(len(chunk))]

    @torch.inference_mode()
    def forward(self, batch: EvalBatch) -> Any:
        """Return the network's output for a prepared batch. Call inside `running`."""
        with precision_context(self.precision, self.device):
            return self.task.forward(self.model, batch, self.device, self.options)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Move the model to the device and put it in eval mode; restore its train/eval mode afterwards."""
        was_training = self.model.training
        self.model.to(self.device).eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def _item(self, each: Input, number: int) -> Item:
        name = str(each) if isinstance(each, str | Path) else f"input {number}"
        data: Data = _pixels(each, name) if isinstance(each, Tensor) else Path(each) if isinstance(each, str) else each
        return Item(name, with_depth(data, self.bit_depth), None)


def read_size(size: Size | int | str) -> Size:
    """Return (height, width) from a side, text such as "224" or "160x256", or a pair. Raises UserError otherwise."""
    if isinstance(size, str):
        sizes = parse_sizes(size)
        if len(sizes) != 1:
            raise UserError(f"size is {size!r}, but a single size is expected: a side or HEIGHTxWIDTH.")
        return sizes[0]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _pixels(tensor: Tensor, name: str) -> np.ndarray:
    """Convert (…, C, H, W) to (…, H, W, C) of uint8, without the last dimension for greyscale."""
    if tensor.is_floating_point():
        if not (tensor.isfinite().all() and tensor.min() >= 0 and tensor.max() <= 1):
            raise UserError(f"{name} is a tensor with values outside 0 to 1: give pixels that are not normalised")
        tensor = (tensor.float() * 255).round().to(torch.uint8)
    pixels: np.ndarray = tensor.cpu().movedim(-3, -1).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels
