"""Inputs of their own sizes: shapes, batches of one shape, and results in order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import anyres
from anyres.data import BadImage, Item
from anyres.data.fitting import OwnSize
from anyres.errors import UserError
from anyres.inference import predictor as module
from anyres.inference.predictor import Predictor
from anyres.tasks.detection.network import Detector
from anyres.tasks.segmentation.network import Segmenter
from anyres.tasks.video.network import create_video_model

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
sides = st.integers(1, 70_000)


@given(sides, sides, st.integers(1, 700), st.sampled_from((1, 4, 16, 32)), st.integers(1, 48))
def test_native_sizes_keep_to_the_budget_and_the_rules(
    height: int, width: int, side: int, divisor: int, least: int
) -> None:
    shortest = -(-least // divisor) * divisor
    if side < shortest:
        with pytest.raises(UserError, match=f"give at least {shortest}"):
            OwnSize(side * side, divisor, least)
        return
    h, w = OwnSize(side * side, divisor, least).of((height, width), "a")
    assert h % divisor == w % divisor == 0
    assert min(h, w) >= least
    assert h * w <= side * side * (1 if min(h, w) == shortest else 1.78)  # rounding 1.5 to 2 strides, at most
    if min(h, w) > 2 * divisor + least:  # far from the limits only rounding changes the ratio
        assert h / w == pytest.approx(height / width, rel=1.1 * divisor * (1 / h + 1 / w))


def test_original_sizes_are_left_alone_unless_the_model_cannot_take_them() -> None:
    assert OwnSize(None, 32, 16).of((17, 1001), "a") == (17, 1001)
    with pytest.raises(BadImage, match="a: it has 1001x15 pixels, and the model needs sides of 16"):
        OwnSize(None, 32, 16).of((15, 1001), "a")


def classifier() -> Any:
    torch.manual_seed(0)
    model: Any = anyres.create_model("resformer_tiny", num_classes=5, **SMALL).eval()
    nn.init.normal_(model.head.weight)
    return model


def segmenter() -> Any:
    torch.manual_seed(0)
    return Segmenter.build("resformer_tiny", 3, dict(SMALL), head="semantic_fpn", channels=16).eval()


def detector() -> Any:
    torch.manual_seed(0)
    args = {"embed_dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1)}
    model: Any = Detector.build("cmt_tiny", 3, args, head="retinanet", channels=16).eval()
    for parameter in model.head.parameters():
        if parameter.min() < -4:  # a bias for which there is hardly ever an object
            nn.init.zeros_(parameter)
    return model


def images(count: int, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    shapes = rng.choice([24, 30, 40, 57], (count, 2))
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in shapes]


def clips() -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (4, *shape, 3), dtype=np.uint8) for shape in ((20, 30), (30, 20)) * 3]


def same(one: Any, other: Any) -> None:
    assert one.name == other.name
    assert one.problem == other.problem
    for left, right in zip(one.values(), other.values(), strict=True):
        for a, b in zip(left, right, strict=True):
            assert a == (pytest.approx(b, abs=1e-5) if isinstance(b, float) else b)


@pytest.mark.parametrize("size", ["native", "native:24", "native:20x28", "original", 24, (24, 40)])
def test_batches_of_mixed_images_give_what_each_gives_alone(size: Any) -> None:
    model = classifier()
    model.pretrained_cfg["train_sizes"] = [32]
    inputs = images(40)
    inputs[7:9] = [b"no image", np.zeros((3, 40, 3), np.uint8)]
    together = Predictor(model, size, batch_size=4)(inputs)
    for one, other in zip(together, Predictor(model, size, batch_size=1)(inputs), strict=True):
        same(one, other)
    assert [bool(result.problem) for result in together][:10] == [*[False] * 7, True, size == "original", False]


@pytest.mark.parametrize("size", ["native:32", "original", 32])
def test_the_other_tasks_take_the_same_sizes(size: Any) -> None:
    cases: list[tuple[Any, Any, Any]] = [(segmenter(), images(12), {}), (detector(), images(12), {"threshold": 0.0})]
    cases += [(create_video_model("resformer_tiny", 4, 2, **SMALL).eval(), clips(), {})]
    for model, inputs, options in cases:
        together = Predictor(model, size, batch_size=4, **options)(inputs)
        for one, other in zip(together, Predictor(model, size, batch_size=1, **options)(inputs), strict=True):
            assert one.values()
            same(one, other)


class Counting(nn.Module):
    """Remembers the shapes of its inputs."""

    num_classes, in_chans, minimum_size = 3, 3, 4

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 32, 32)}
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return x.mean((2, 3))


def test_batches_are_full_where_shapes_repeat_and_smaller_where_images_are_large() -> None:
    model = Counting()
    wide, tall, large = (np.zeros((height, width, 3), np.uint8) for height, width in ((16, 64), (64, 16), (64, 64)))
    Predictor(model, "original", batch_size=4)([wide, tall] * 8)
    assert model.shapes == [(4, 3, 16, 64), (4, 3, 64, 16)] * 2
    model.shapes.clear()
    Predictor(model, "original", batch_size=4)([large] * 2 + [wide])
    assert model.shapes == [(1, 3, 64, 64)] * 2 + [(1, 3, 16, 64)]


@pytest.mark.parametrize("workers", [0, 1])
def test_only_a_window_of_items_is_read_ahead_of_the_results(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 2)
    taken = 0

    def items() -> Iterator[Item]:
        nonlocal taken
        for number in range(200):
            taken += 1
            side = 8 + number if number % 10 else 99  # shapes that never come back, and one that fills batches
            yield Item(str(number), np.zeros((side, side, 3), np.uint8), None)

    for place, result in enumerate(Predictor(Counting(), "original", batch_size=4, workers=workers).stream(items())):
        assert result.name == str(place)
        assert taken <= place + 2 * 4 + 1 + 4 + workers * 8
    assert taken == 200


def test_pixels_that_wait_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_BYTES", 3 * 40 * 40 * 3)
    model = Counting()
    rng = random.Random(0)
    inputs = [np.zeros((rng.randint(20, 40), 40, 3), np.uint8) for _ in range(30)]
    results = Predictor(model, "original", batch_size=30)(inputs)
    assert len(results) == 30
    assert len(model.shapes) > 15


@settings(max_examples=5)
@given(st.sampled_from(("native:", "native:x", "natives", "native:3", "original:224", "24,32", "0")))
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(UserError, match="size"):
        Predictor(classifier(), text)
