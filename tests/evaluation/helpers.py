"""Small stand-ins: a source of grey squares, and a model that answers by a table."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anyres.data import Item, MapSource
from anyres.evaluation.results import Row


class GreySource(MapSource):
    """Image i is a square of brightness 10·i with the given label; an image in `broken` cannot be read."""

    def __init__(self, labels: list[int], classes: int, broken: tuple[int, ...] = ()) -> None:
        super().__init__("grey", [f"class{number}" for number in range(classes)], in_chans=1)
        self.labels, self.broken = labels, broken
        self.mean, self.std = (0.0,), (1.0,)

    def __len__(self) -> int:
        return len(self.labels)

    def _item(self, index: int) -> Item:
        data: Any = b"no image" if index in self.broken else np.full((20, 20), 10 * index, dtype=np.uint8)
        return Item(f"grey/{index}", data, self.labels[index])


class TableModel(nn.Module):
    """Answers an image of brightness 10·i with row i of a table, whatever its size; refuses the sizes in `refuses`."""

    num_classes: int
    """Set where names do not say it."""

    def __init__(self, logits: Tensor, refuses: tuple[tuple[int, int], ...] = (), **cfg: Any) -> None:
        super().__init__()
        self.table = nn.Parameter(logits.float())
        self.refuses = refuses
        names = [f"class{number}" for number in range(logits.shape[1])]
        self.pretrained_cfg = {"input_size": (1, 32, 32), "label_names": names, **cfg}
        self.calls: list[tuple[int, int]] = []
        self.inference: set[bool] = set()

    def forward(self, images: Tensor) -> Tensor:
        size = (images.shape[2], images.shape[3])
        if size in self.refuses:
            raise AssertionError(f"Input height ({size[0]}) doesn't match model (32).\nmore lines")
        self.calls.append(size)
        self.inference.add(torch.is_inference_mode_enabled())
        index = (images.mean((1, 2, 3)) * 255 / 10).round().long()
        return self.table[index]


def make_row(model: str, height: int, width: int, top1: float | None, **fields: Any) -> Row:
    """A row with a top-1 of so much, or without scores; "top5" and "loss" may be among the fields."""
    scores = {name: value for name in ("top5", "loss") if (value := fields.pop(name, None)) is not None}
    defaults: dict[str, Any] = {
        "trained": False, "count": 1000, "bad": 0, "gflops": 1.0, "params": 10,
        "images_per_second": 100.0, "latency_ms": 12.0, "peak_memory_mb": 50.0,
    }  # fmt: skip
    scores = {} if top1 is None else {"top1": top1, **scores}
    return Row(model=model, height=height, width=width, scores=scores, **{**defaults, **fields})
