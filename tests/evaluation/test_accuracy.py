from __future__ import annotations

import math
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from anyres.data import open_source
from anyres.data.config import DataConfig
from anyres.errors import UserError
from anyres.evaluation.evaluate import evaluate, sample_images
from tests.evaluation.helpers import GreySource, TableModel


def table(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows)


def test_counts_and_loss_match_hand_counts() -> None:
    # Scores of 7 classes; places of the true class by hand: 1st, 2nd, 5th, 6th, 1st.
    logits = table(
        [
            [9, 1, 2, 3, 4, 5, 6],
            [8, 9, 1, 2, 3, 4, 5],
            [3, 9, 8, 7, 6, 5, 4],
            [1, 2, 9, 8, 7, 6, 5],
            [0, 0, 0, 0, 0, 0, 1],
        ]
    )
    labels = [0, 0, 5, 1, 6]
    source = GreySource(labels, classes=7)
    model = TableModel(logits).train()
    measured = evaluate(model, source, (16, 16), batch_size=2)
    assert measured.scores["top1"] == pytest.approx(100 * 2 / 5)
    assert measured.scores["top5"] == pytest.approx(100 * 4 / 5)
    losses = [
        math.log(sum(math.exp(score) for score in row)) - row[label]
        for row, label in zip(logits.tolist(), labels, strict=True)
    ]
    assert measured.scores["loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)
    assert (measured.count, len(measured.bad_images)) == (5, 0)
    assert model.training
    assert model.inference == {True}


def test_batch_size_does_not_matter() -> None:
    source = GreySource([i % 7 for i in range(20)], classes=7)
    model = TableModel(torch.randn(26, 7, generator=torch.Generator().manual_seed(0)))
    results = [evaluate(model, source, (8, 24), batch_size) for batch_size in (1, 7, 64)]
    first, *others = (result.scores for result in results)
    for scores, result in zip(others, results[1:], strict=True):
        assert (scores["top1"], scores["top5"], result.count) == (first["top1"], first["top5"], 20)
        assert scores["loss"] == pytest.approx(first["loss"], rel=1e-6)


@pytest.mark.parametrize(("classes", "has_top5"), [(5, False), (6, True)])
def test_top5_only_above_five_classes(classes: int, has_top5: bool) -> None:
    source = GreySource([0, 1], classes)
    measured = evaluate(TableModel(torch.eye(classes)), source, (16, 16))
    assert ("top5" in measured.scores) is has_top5
    assert measured.scores["top1"] == 100


def test_bad_images_are_counted_and_left_out() -> None:
    logits = torch.eye(6)
    measured = evaluate(TableModel(logits), GreySource([0, 1, 2, 3], classes=6, broken=(1, 3)), (16, 16), batch_size=2)
    assert (measured.count, len(measured.bad_images), measured.scores["top1"]) == (2, 2, 100)
    assert all(f"grey/{index}" in text for index, text in zip((1, 3), measured.bad_images, strict=True))
    with pytest.raises(UserError, match="no readable image"):
        evaluate(TableModel(logits), GreySource([0], classes=6, broken=(0,)), (16, 16))


def test_bad_files_of_a_folder_are_counted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("L", (30, 20), 0 if name == "a" else 10).save(tmp_path / "val" / name / "1.png")
        Image.new("L", (30, 20)).save(tmp_path / "train" / name / "1.png")
    whole = (tmp_path / "val" / "a" / "1.png").read_bytes()
    (tmp_path / "val" / "a" / "2.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "val" / "b" / "3.jpg").write_bytes(b"")
    source = open_source(tmp_path, "val", in_chans=1)
    measured = evaluate(TableModel(torch.eye(6), mean=(0.0,), std=(1.0,), label_names=list("abcdef")), source, (16, 16))
    assert (measured.count, len(measured.bad_images), measured.scores["top1"]) == (2, 2, 100)


def test_labels_are_matched_by_name() -> None:
    source = GreySource([0, 1, 2], classes=3)  # class0, class1, class2
    logits = torch.eye(4)[[2, 0, 3]]  # the model's outputs for them stand at 2, 0 and 3
    model = TableModel(logits, label_names=["class1", "other", "class0", "class2"])
    assert evaluate(model, source, (16, 16)).scores["top1"] == 100
    with pytest.raises(UserError, match="class0"):
        evaluate(TableModel(logits, label_names=["class1", "class2", "x", "y"]), source, (16, 16))
    with pytest.raises(UserError, match=r"class0.*cow"):  # no name in common: both lists are shown
        evaluate(TableModel(torch.eye(3), label_names=["cat", "dog", "cow"]), source, (16, 16))


def test_numbers_are_matched_as_numbers() -> None:
    source = GreySource([0, 1, 2], classes=3)
    source.label_names = ["10", "2", "999"]  # as folders are sorted
    model = TableModel(torch.eye(1000), label_names=None)
    model.num_classes = 1000
    assert DataConfig.of(model).places(source).tolist() == [10, 2, 999]
    source.label_names = ["cats", "dogs", "tench"]
    with pytest.raises(UserError, match=r"cats.*ImageNet's 1000 classes.*names=FILE"):
        DataConfig.of(model).places(source)


def test_a_thousand_classes_take_wordnet_ids() -> None:
    source = GreySource([0], classes=1)
    source.label_names = ["n01491361"]  # tiger shark, class 3 of ImageNet-1k
    model = TableModel(torch.eye(1000), label_names=None)
    model.num_classes = 1000
    assert DataConfig.of(model).places(source).tolist() == [3]


def test_a_source_with_more_classes_is_refused() -> None:
    with pytest.raises(UserError, match="class2"):
        evaluate(TableModel(torch.eye(2)), GreySource([5], classes=6), (16, 16))


def test_preparation_is_the_models_own_then_the_sources() -> None:
    source = GreySource([0], classes=2)
    own = DataConfig.of(
        TableModel(torch.eye(2), mean=(0.5,), std=(0.25,), crop_pct=0.9, interpolation="bilinear"), source
    )
    assert (own.mean, own.std, own.crop_pct, own.interpolation, own.in_chans) == ((0.5,), (0.25,), 0.9, "bilinear", 1)
    other = DataConfig.of(TableModel(torch.eye(2)), source)
    assert (other.mean, other.std, other.crop_pct, other.interpolation) == ((0.0,), (1.0,), 0.875, "bicubic")
    three = DataConfig.of(TableModel(torch.eye(2), mean=(0.5,) * 3, std=(0.5,) * 3), source)
    assert (three.mean, three.std) == ((0.0,), (1.0,))


@pytest.mark.parametrize(("cfg", "whose"), [
    ({"mean": (0.5,), "std": (0.25,)}, None), ({}, "grey"), ({"mean": (0.5,)}, "grey"),
    ({"mean": (0.5,) * 3, "std": (0.5,) * 3}, "grey"),
])  # fmt: skip
def test_statistics_that_are_not_the_models_are_told(cfg: Any, whose: Any, caplog: pytest.LogCaptureFixture) -> None:
    """In the log where data are opened or predicted, and in the sentence of reports."""
    source, model = GreySource([0], classes=2), TableModel(torch.eye(2), **cfg)
    text = f"of {whose}, as the model states none that fit"
    assert (text in DataConfig.of(model, source).normalisation) == (whose is not None)
    DataConfig.of(model, source).tell_borrowed()
    assert (text in caplog.text) == (whose is not None)
    caplog.clear()
    DataConfig.of(model).tell_borrowed()
    assert ("mean 0.449, std 0.226 of ImageNet" in caplog.text) == (whose is not None)


def test_channels_that_images_have_not_are_refused() -> None:
    with pytest.raises(UserError, match="takes 4 channels, but images have 1 or 3"):
        DataConfig.of(TableModel(torch.eye(2), input_size=(4, 32, 32)))


def test_first_images_have_their_own_colours() -> None:
    source = GreySource([0, 0, 0], classes=2)
    images = sample_images(TableModel(torch.eye(2), mean=(0.4,), std=(0.2,)), source, (12, 20), 2)
    assert [image.size for image in images] == [(20, 12), (20, 12)]
    assert [image.getpixel((0, 0)) for image in images] == [(0, 0, 0), (10, 10, 10)]


def measure_share(rank: int, port: int, answers: multiprocessing.Queue[Any]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    source = GreySource([i % 7 for i in range(11)], classes=7, broken=(4,))
    answers.put(evaluate(random_table(), source, (16, 16), batch_size=3))
    dist.destroy_process_group()


def random_table() -> TableModel:
    return TableModel(torch.randn(26, 7, generator=torch.Generator().manual_seed(0)))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="starts its processes by fork")
def test_two_processes_count_every_image_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [context.Process(target=measure_share, args=(rank, port, answers)) for rank in range(2)]
    for child in children:
        child.start()
    measured = [answers.get(timeout=60) for _ in children]
    for child in children:
        child.join(timeout=60)
    source = GreySource([i % 7 for i in range(11)], classes=7, broken=(4,))
    alone = evaluate(random_table(), source, (16, 16))
    for share in measured:
        assert (share.count, len(share.bad_images)) == (10, 1)
        assert (share.scores["top1"], share.scores["top5"]) == (alone.scores["top1"], alone.scores["top5"])
        assert share.scores["loss"] == pytest.approx(alone.scores["loss"], rel=1e-6)
        assert share.bad_images == alone.bad_images
