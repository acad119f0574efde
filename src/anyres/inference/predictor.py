"""From pictures and clips to results: the one way, whatever the task.

An item is decoded and resized by the task's transform, batched, run through the network, and turned into a `Result` at
the size of the original. Predictions, sweeps, demos and the validation of training runs all come this way.
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
"""A file, its bytes, a PIL image, or pixels: an array (H, W) or (H, W, 3) uint8, a tensor (C, H, W) uint8 or of numbers
from 0 to 1; of clips an array (T, H, W, 3) or a tensor (T, C, H, W)."""


class Predictor:
    """A network, ready for inputs of any size.

    >>> predictor = Predictor("runs/digits", size=96)
    >>> predictor("photo.jpg").labels
    >>> [result.rows() for result in predictor(["a.png", Image.open("b.jpg")])]

    Args:
        model: a model, or what the command line takes for one: a run folder, a saved model, `hf-hub:OWNER/NAME`, a
            weights file, a name.
        size: (height, width), a side, or "HEIGHTxWIDTH" that inputs are prepared for; by default the largest size that
            the model was trained at.
        names: a file of class names, instead of those that come with the model.
        device: "auto" (CUDA if there is one), "cpu", "cuda", …
        precision: "float32", or "bfloat16" or "float16" under autocast.
        batch_size: items per pass; by default the task's.
        bit_depth: bits of pictures of more than 8 bits, where the files do not say.
        source: an open data source, for what the model does not state about its inputs.
        options: the options of the task's tests, such as `topk`, `threshold`, `scales` or `flip`.

    Raises UserError for a size below the model's minimum, options that do not exist, and weights or outputs that are
    not finite.
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
        """What the network finds: a `Result` for one input, a list of them, in their order, for several.

        Raises BadImage for a single input that cannot be read; among several it becomes a result with a `problem`.
        """
        if isinstance(inputs, str | Path | bytes | Image.Image | np.ndarray | Tensor):
            item = self._item(inputs, 0)
            result = next(self.stream([item]))
            if result.problem:
                raise BadImage(item.name, result.problem)
            return result
        return list(self.stream(self._item(each, number) for number, each in enumerate(inputs)))

    def stream(self, items: Iterable[Item]) -> Iterator[Result]:
        """What the network finds in item after item, in their order; labels are not looked at. A batch is in memory at
        a time."""
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
        """What the network says about a prepared batch; inside `running`."""
        with precision_context(self.precision, self.device):
            return self.task.forward(self.model, batch, self.device, self.options)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model on the device and in eval mode; afterwards it has its mode again."""
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
    """(height, width) of a side, of "HEIGHTxWIDTH", or as it is. Raises UserError."""
    if isinstance(size, str):
        sizes = parse_sizes(size)
        if len(sizes) != 1:
            raise UserError(f"size is {size!r}, but one is wanted: a side or HEIGHTxWIDTH.")
        return sizes[0]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _pixels(tensor: Tensor, name: str) -> np.ndarray:
    """(…, C, H, W) → (…, H, W, C) uint8, without the last for grey ones."""
    if tensor.is_floating_point():
        if not (tensor.isfinite().all() and tensor.min() >= 0 and tensor.max() <= 1):
            raise UserError(f"{name} is a tensor of numbers that are not all from 0 to 1: give pixels, not normalised")
        tensor = (tensor.float() * 255).round().to(torch.uint8)
    pixels: np.ndarray = tensor.cpu().movedim(-3, -1).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels
