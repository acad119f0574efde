from __future__ import annotations

import math
import multiprocessing
import os
import socket
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from anyres.data import Item
from anyres.data.segmentation import ComposedDigits, SegmentationSource, open_segmentation
from anyres.errors import UserError
from anyres.evaluation import evaluate
from anyres.tasks.segmentation.score import ConfusionMatrix
from tests.typed import as_a


class Greys(SegmentationSource):
    """Pictures of blocks whose brightness is 40 times their class, of several sizes; one in `broken` cannot be read."""

    def __init__(self, count: int = 6, classes: int = 4, broken: tuple[int, ...] = (), ignored: bool = True) -> None:
        super().__init__("greys", [f"class{number}" for number in range(classes)], in_chans=1)
        self.count, self.broken, self.ignored = count, broken, ignored
        self.mean, self.std = (0.0,), (1.0,)

    def __len__(self) -> int:
        return self.count

    def _item(self, index: int) -> Item:
        rng = np.random.default_rng(index)
        classes = np.kron(rng.integers(0, 4, (3, 4 + index % 2), dtype=np.uint8), np.ones((8, 8), np.uint8))
        labels = classes.copy()
        if self.ignored:
            labels[:2] = 255
        return Item(f"greys/{index}", b"broken" if index in self.broken else 40 * classes, labels)


class Nearest(nn.Module):
    """Answers each pixel with the class of its brightness; `confused` (a, b) takes every a for b."""

    task = "segmentation"

    def __init__(self, classes: int = 4, confused: tuple[int, int] | None = None, **cfg: Any) -> None:
        super().__init__()
        self.classes, self.confused = classes, confused
        self.in_chans = 1
        self.pretrained_cfg = {"label_names": [f"class{place}" for place in range(classes)], **cfg}
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(images.shape))
        levels = torch.arange(self.classes).view(1, -1, 1, 1) * 40 / 255
        logits = -1000 * (images - levels).abs()
        if self.confused is not None:
            right, wrong = self.confused
            logits[:, wrong] = torch.maximum(logits[:, wrong], logits[:, right] + 1)
        return logits


def test_a_matrix_counted_by_hand() -> None:
    matrix = ConfusionMatrix(5)
    # Class 3 is in neither map and leaves the mean; class 4 is only predicted and counts as 0.
    matrix.add(torch.tensor([[0, 0, 1, 1], [2, 4, 2, 0]]), torch.tensor([[0, 0, 1, 0], [2, 2, 255, 255]]))
    matrix.add(torch.tensor([1, 0]), torch.tensor([1, 2]))
    assert matrix.counts.tolist() == [
        [2, 1, 0, 0, 0],
        [0, 2, 0, 0, 0],
        [1, 0, 1, 0, 1],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert matrix.iou[:3].tolist() == pytest.approx([2 / 4, 2 / 3, 1 / 3])
    assert math.isnan(matrix.iou[3])
    assert matrix.iou[4] == 0
    assert matrix.miou == pytest.approx((2 / 4 + 2 / 3 + 1 / 3 + 0) / 4)
    assert matrix.pixel_accuracy == pytest.approx(5 / 8)
    assert matrix.mean_accuracy == pytest.approx((2 / 3 + 1 + 1 / 3) / 3)
    with pytest.raises(UserError, match="beyond the 5 classes"):
        matrix.add(torch.tensor([0]), torch.tensor([5]))


def test_equals_the_jaccard_index_of_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(0)
    matrix = ConfusionMatrix(7)
    metric = metrics.MulticlassJaccardIndex(7, average="macro", ignore_index=255)
    for _ in range(5):
        # Class 6 appears in neither.
        prediction, label = (torch.randint(0, 6, (2, 20, 30), generator=generator) for _ in range(2))
        label[torch.rand(label.shape, generator=generator) < 0.2] = 255
        matrix.add(prediction, label)
        metric.update(prediction, label)
    assert matrix.miou == pytest.approx(metric.compute().item(), rel=1e-6)


def test_a_model_that_knows_scores_100_and_images_of_one_shape_share_a_batch() -> None:
    model = Nearest().train()
    measured = evaluate(model, Greys(broken=(1,)), (24, 24), batch_size=4)
    assert measured.scores == {"miou": 100, "pixel_accuracy": 100, "mean_accuracy": 100}
    assert next(iter(measured.scores)) == "miou"
    assert measured.count == 5
    assert [name.split(":")[0] for name in measured.bad_images] == ["greys/1"]
    assert measured.by_class == {f"class{number}": 100 for number in range(4)}
    assert model.shapes == [(2, 1, 24, 32), (1, 1, 24, 40), (1, 1, 24, 32), (1, 1, 24, 40)]
    assert model.training


def test_scores_are_of_the_original_pixels_whatever_the_size() -> None:
    source = Greys()
    model = Nearest(confused=(2, 3))
    measured = evaluate(model, source, (24, 24))
    labels = np.concatenate([source.item(index).label.data.ravel() for index in range(len(source))])
    pixels = np.bincount(labels[labels != 255], minlength=4)
    third = 100 * pixels[3] / (pixels[2] + pixels[3])
    assert measured.by_class == {"class0": 100, "class1": 100, "class2": 0, "class3": pytest.approx(third)}
    assert measured.scores["miou"] == pytest.approx((200 + third) / 4)
    assert measured.scores["pixel_accuracy"] == pytest.approx(100 * (1 - pixels[2] / pixels.sum()))
    assert measured.scores["mean_accuracy"] == pytest.approx(75)
    large = evaluate(model, source, (72, 72), divisor=32)
    assert {shape[2:] for shape in model.shapes[6:]} == {(96, 96), (96, 128)}
    assert large.scores == pytest.approx(measured.scores)


def test_scales_mirror_images_and_windows_reach_the_model() -> None:
    model = Nearest()
    measured = evaluate(model, Greys(2), (24, 24), scales=(0.5, 1.0), flip=True)
    assert [shape[2:] for shape in model.shapes[:4]] == [(12, 16), (12, 16), (24, 32), (24, 32)]
    assert measured.scores["miou"] > 60
    model.shapes.clear()
    assert evaluate(model, Greys(1), (24, 24), window=24).scores["miou"] == 100
    assert model.shapes == [(1, 1, 24, 24)] * 2


def test_classes_are_matched_by_name_and_one_that_is_absent_leaves_the_mean() -> None:
    class Renamed(Nearest):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images)[:, [3, 2, 1, 0, 4]]

    names = [f"class{number}" for number in (3, 2, 1, 0, 4)]
    measured = evaluate(Renamed(5, label_names=names), Greys(), (24, 24))
    assert measured.by_class == {"class3": 100, "class2": 100, "class1": 100, "class0": 100, "class4": None}
    assert measured.note == "mIoU is the mean over 4 of 5 classes: the others are neither labelled nor predicted"
    assert measured.scores["miou"] == 100


def test_a_pixel_without_a_number_stops_the_test() -> None:
    class Diverged(Nearest):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = super().forward(images)
            logits[0, 2, 5, 5] = torch.nan
            return logits

    with pytest.raises(UserError, match="outputs of Diverged for greys/0 contain NaN"):
        evaluate(Diverged(), Greys(), (24, 24))


def test_refusals() -> None:
    with pytest.raises(UserError, match="class3"):
        evaluate(Nearest(3), Greys(), (24, 24))
    with pytest.raises(UserError, match="no readable image"):
        evaluate(Nearest(), Greys(2, broken=(0, 1)), (24, 24))
    source = Greys(2)
    source.table[:4] = 255
    with pytest.raises(UserError, match="no labelled pixel"):
        evaluate(Nearest(), source, (24, 24))
    source.table[2] = 2
    with pytest.raises(UserError, match="only one class has labelled pixels in the 2 images of greys"):
        evaluate(Nearest(), source, (24, 24))


def test_a_segmenter_on_composed_digits() -> None:
    from anyres.tasks.segmentation.network import Segmenter

    torch.manual_seed(0)
    torch.set_num_threads(1)
    source = open_segmentation("digits", "val")
    as_a(ComposedDigits, source).scenes.count = 2
    model = Segmenter.build("resformer_tiny", 11, {"depth": 4}, head="semantic_fpn", channels=16)
    model.pretrained_cfg["label_names"] = source.label_names
    measured = evaluate(model, source, (64, 64), batch_size=2)
    assert measured.count == 2
    assert 0 <= measured.scores["miou"] < 50
    assert list(measured.by_class) == source.label_names


def measure_share(rank: int, port: int, answers: multiprocessing.Queue[Any]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=3)
    answers.put(evaluate(Nearest(confused=(2, 3)), Greys(2, broken=()), (24, 24)))
    dist.destroy_process_group()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="starts its processes by fork")
def test_three_processes_count_every_image_once_even_if_one_has_none() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [context.Process(target=measure_share, args=(rank, port, answers)) for rank in range(3)]
    for child in children:
        child.start()
    measured = [answers.get(timeout=60) for _ in children]
    for child in children:
        child.join(timeout=60)
    assert measured == [evaluate(Nearest(confused=(2, 3)), Greys(2), (24, 24))] * 3
