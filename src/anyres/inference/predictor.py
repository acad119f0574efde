"""Run a model of any task on images or clips.

Items are decoded and resized by the task's eval transform, batched, run through the network and turned into `Result`s
at the size of the original. Predictions, sweeps, demos and validation in training all use this module.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from anyres.allocator import keep_memory
from anyres.data import BadImage, Item
from anyres.data.config import DataConfig
from anyres.data.decode import Data, with_depth
from anyres.data.fitting import OwnSize
from anyres.data.prepared import prepared
from anyres.data.samples import EvalBatch, EvalSample, pixels_of
from anyres.data.schedule import MAX_SIDE, parse_sizes
from anyres.errors import UserError
from anyres.inference.modelspec import open_model
from anyres.inference.precision import precision_context
from anyres.shapes import Size
from anyres.tasks import task_of
from anyres.tasks.finite import check_weights
from anyres.tasks.results import Result, Unreadable

Input = str | Path | bytes | Image.Image | np.ndarray | Tensor | BadImage
"""A file, its bytes, a PIL image, pixels, or the reason why there is none of these.

Pixels are an array (H, W) or (H, W, 3) of uint8, or a tensor (C, H, W) of uint8 or of floats from 0 to 1. Clips are an
array (T, H, W, 3) or a tensor (T, C, H, W).
"""

NATIVE, ORIGINAL = "native", "original"
"""Sizes that follow each image; see `Predictor`."""
WINDOW = 8
"""Batches' worth of items that may wait for others of their shape …"""
WINDOW_BYTES = 512 << 20
"""… as long as their pixels take no more than this."""
USUAL_AREA = 224 * 224
"""Pixels of an input for a model that does not state what size it was trained at."""


class _Waiting(NamedTuple):
    place: int
    item: Item
    sample: EvalSample


class Predictor:
    """Runs a network on inputs of any size.

    >>> predictor = Predictor("runs/digits", size=96)
    >>> predictor("photo.jpg").labels
    >>> [result.rows() for result in predictor(["a.png", Image.open("b.jpg")])]

    Args:
        model: a model, or any form that the command line accepts: a run folder, a saved model, `hf-hub:OWNER/NAME`, a
            weights file or a model name.
        size: input size as (height, width), a side, or "HEIGHTxWIDTH"; by default the model's largest training size.
            "native" shows each image whole with its own aspect ratio and the area of the largest training size, or
            with that of the size after a colon ("native:320"); sides are multiples of the model's stride. "original"
            leaves images as large as they are.
        names: a file of class names to use instead of the model's own.
        device: "auto" (CUDA if available), "cpu", "cuda", …
        precision: "float32", or "bfloat16" or "float16" under autocast.
        batch_size: items per batch; by default that of the task. Only items of one shape share a batch, so that none
            changes the result of another, and batches are smaller where "original" makes inputs larger than usual.
        workers: number of processes that decode items.
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
        size: Size | OwnSize | int | str | None = None,
        *,
        names: str | None = None,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        batch_size: int | None = None,
        workers: int = 0,
        bit_depth: int | None = None,
        source: Any = None,
        **options: Any,
    ) -> None:
        keep_memory()
        self.model: Any = model if isinstance(model, nn.Module) else open_model(str(model), names)[1]
        self.task = task_of(self.model)
        self.config = DataConfig.of(self.model, source)
        self.size = input_size(self.config, size)
        self.options = self.task.test_options(**options)
        self.transform = self.task.transform(self.config, self.size, self.options)
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.precision = precision
        self.batch_size = batch_size or self.task.test_batch_size
        self.workers = workers
        self.bit_depth = bit_depth
        check_weights(self.model)

    def __call__(self, inputs: Input | Sequence[Input]) -> Any:
        """Return a `Result` for a single input, or a list of them for several inputs, in the same order.

        Raises BadImage if a single input cannot be read; among several, it gives a result with a `problem`.
        """
        if isinstance(inputs, Input):
            item = self._item(inputs, 0)
            result = next(self.stream([item]))
            if result.problem:
                raise BadImage(item.name, result.problem)
            return result
        return list(self.stream(self._item(each, number) for number, each in enumerate(inputs)))

    def stream(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield the result of each item, in order. Labels are ignored.

        Items wait for others of their shape until they fill a batch or the window (`WINDOW`, `WINDOW_BYTES`) is full,
        so memory is bounded however many items there are.
        """
        self.config.tell_borrowed()
        found: dict[int, Result] = {}
        groups: dict[Hashable, list[_Waiting]] = {}  # in the order of their oldest items
        due = held = 0
        with self.running():
            for place, (item, sample) in enumerate(prepared(self.transform, map(_unlabelled, items), self.workers)):
                if isinstance(sample, BadImage):
                    found[place] = Unreadable(item.name, sample.reason)
                else:
                    shape = self.transform.shape(sample)
                    groups.setdefault(shape, []).append(_Waiting(place, item, sample))
                    held += _bytes_of(sample)
                    ready = [shape] if len(groups[shape]) >= self._most(sample) else []
                    while ready or (groups and self._is_full(place - next(iter(groups.values()))[0].place, held)):
                        group = groups.pop(ready.pop() if ready else next(iter(groups)))
                        held -= sum(_bytes_of(waiting.sample) for waiting in group)
                        found |= self._results(group)
                while due in found:
                    yield found.pop(due)
                    due += 1
            for group in groups.values():
                found |= self._results(group)
            yield from (found[place] for place in sorted(found))

    def _is_full(self, ahead: int, held: int) -> bool:
        """Return whether no more items may be read before the oldest one, `ahead` items back, has its result."""
        return ahead >= WINDOW * self.batch_size or held > WINDOW_BYTES

    def _most(self, sample: EvalSample) -> int:
        """Return how many items like this one make a batch."""
        if not isinstance(self.size, OwnSize):
            return self.batch_size
        usual = self.size.pixels or max((h * w for h, w in self.config.train_sizes), default=USUAL_AREA)
        height, width = pixels_of(sample).shape[:2]
        return max(1, min(self.batch_size, round(self.batch_size * usual / (height * width))))

    @torch.inference_mode()
    def _results(self, group: Sequence[_Waiting]) -> dict[int, Result]:
        """Run the network on items of one shape and return their results by place."""
        batch = self.transform.collate([each.item for each in group], [each.sample for each in group])
        results = self.task.results(self.config, self.forward(batch), batch, self.options)
        return {each.place: result for each, result in zip(group, results, strict=True)}

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


def input_size(config: DataConfig, size: Size | OwnSize | int | str | None) -> Size | OwnSize:
    """Return the input size of a model that `size` stands for; see `Predictor`.

    Raises UserError for any other text, and for a size below the model's minimum.
    """
    if isinstance(size, OwnSize):
        return size
    if isinstance(size, str) and size.startswith(NATIVE):
        height, width = config.size if size == NATIVE else read_size(size.removeprefix(f"{NATIVE}:"))
        return OwnSize(height * width, config.stride, config.minimum_size)
    if size == ORIGINAL:
        return OwnSize(None, least=config.minimum_size)
    chosen = config.size if size is None else read_size(size)
    config.check_size(chosen)
    return chosen


def check_size(text: str) -> None:
    """Raise UserError for a text that `Predictor` does not take as a size, whatever the model."""
    if text not in (NATIVE, ORIGINAL):
        read_size(text.removeprefix(f"{NATIVE}:"))


def read_size(size: Size | int | str) -> Size:
    """Return (height, width) from a side, text such as "224" or "160x256", or a pair. Raises UserError otherwise."""
    if isinstance(size, str):
        try:
            sizes = parse_sizes(size)
        except UserError:
            raise UserError(
                f"size is {size[:80]!r}; it must be a side (224), HEIGHTxWIDTH (224x320), {NATIVE}, {NATIVE}:SIDE or "
                f"{ORIGINAL}, with sides from 1 to {MAX_SIDE}"
            ) from None
        if len(sizes) != 1:
            raise UserError(f"size is {size!r}, but a single size is expected: a side or HEIGHTxWIDTH.")
        return sizes[0]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _unlabelled(item: Item) -> Item:
    return item._replace(label=None)


def _bytes_of(sample: EvalSample) -> int:
    views = sample.pixels if isinstance(sample.pixels, list) else [sample.pixels]
    return sum(view.nbytes for view in views)


def _pixels(tensor: Tensor, name: str) -> np.ndarray:
    """Convert (…, C, H, W) to (…, H, W, C) of uint8, without the last dimension for greyscale."""
    if tensor.is_floating_point():
        if not (tensor.isfinite().all() and tensor.min() >= 0 and tensor.max() <= 1):
            raise UserError(f"{name} is a tensor with values outside 0 to 1: give pixels that are not normalised")
        tensor = (tensor.float() * 255).round().to(torch.uint8)
    pixels: np.ndarray = tensor.cpu().movedim(-3, -1).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels
