"""Accuracy of clips: softmax scores summed over views, counted like images."""

from __future__ import annotations

import logging
import math
import multiprocessing
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from anyres.data import Item, MapSource
from anyres.data.clips import Sampling
from anyres.data.config import DataConfig
from anyres.errors import UserError
from anyres.evaluation import evaluate
from anyres.models._registry import create_model


class Greys(MapSource):
    """Video i has frames of brightness 8·i, 8·i + 1, …, 12 of them, 10 x 20 pixels; those in `broken` have none."""

    def __init__(self, labels: list[int], classes: int, broken: tuple[int, ...] = ()) -> None:
        super().__init__("greys", [f"class{number}" for number in range(classes)])
        self.labels, self.broken = labels, broken
        self.mean, self.std, self.crop_pct = (0.0,) * 3, (1.0,) * 3, 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def _item(self, index: int) -> Item:
        frames = 0 if index in self.broken else 12
        ramp = (8 * index + np.arange(frames) // 2).astype(np.uint8)
        return Item(f"greys/{index}", np.tile(ramp[:, None, None, None], (1, 10, 20, 3)), self.labels[index])


class Answers(nn.Module):
    """Answers a clip by the brightness of its first frame: row of a table; notes the shapes it saw."""

    def __init__(self, table: Tensor, num_frames: int = 2) -> None:
        super().__init__()
        self.table = nn.Parameter(table.float())
        self.num_frames = num_frames
        self.pretrained_cfg: dict[str, Any] = {
            "crop_pct": 1.0,
            "frame_stride": 1,
            "label_names": [f"class{place}" for place in range(table.shape[1])],
        }
        self.shapes: set[tuple[int, ...]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.add(tuple(x.shape[1:]))
        return self.table[(x[:, :, 0].mean((1, 2, 3)) * 255).round().long()]


def test_softmax_scores_are_summed_over_views() -> None:
    # Two views of one video, whose first frames have brightness 0 and 5: the first is a little sure of class 0, the
    # second very sure of class 1. Logits summed would say class 0.
    table = torch.zeros(6, 3)
    table[0] = torch.tensor([6.0, 1.0, 0.0])
    table[5] = torch.tensor([-2.0, 2.0, 1.9])
    model = Answers(table)
    measured = evaluate(model, Greys([1], 3), (10, 10), clips=2)
    p, q = table[0].softmax(0), table[5].softmax(0)
    assert (p + q).argmax() == 0
    assert measured.scores["top1"] == 0
    assert measured.scores["loss"] == pytest.approx(-math.log(float(p[1] + q[1]) / 2), rel=1e-6)
    assert model.shapes == {(3, 2, 10, 10)}
    table[0] = torch.tensor([0.6, 0.5, -9.0])
    table[5] = torch.tensor([-4.0, 1.0, 1.2])
    assert table[0].add(table[5]).argmax() == 1
    p, q = table[0].softmax(0), table[5].softmax(0)
    scores = evaluate(Answers(table), Greys([1], 3), (10, 10), clips=2).scores
    assert scores["top1"] == 100 * ((p + q).argmax() == 1)
    assert "top5" not in scores


def test_counts_by_hand_and_bad_videos_are_listed() -> None:
    table = torch.zeros(40, 7)
    for video, best in enumerate([0, 3, 6, 1]):
        table[8 * video] = torch.arange(7)
        table[8 * video, best] = 9
    source = Greys([0, 3, 0, 1, 5], 7, broken=(4,))
    results = [evaluate(Answers(table), source, (10, 20), batch, clips=1, frames=12, stride=1)
               for batch in (1, 3)]  # fmt: skip
    for measured in results:
        assert measured.scores["top1"] == 75
        assert measured.scores["top5"] == 75  # the label 0 of the third has the lowest score
        assert measured.count == 4
        assert measured.bad_images == ("greys/4: the video holds no frames",)
    assert results[0].scores["loss"] == pytest.approx(results[1].scores["loss"], rel=1e-6)


def test_three_crops_and_short_videos(caplog: pytest.LogCaptureFixture) -> None:
    model = Answers(torch.zeros(20, 3))
    with caplog.at_level(logging.WARNING):
        evaluate(model, Greys([0, 1], 3), (8, 8), clips=2, crops=3, frames=2, stride=8)
    assert "2 videos of greys are shorter than a clip" in caplog.text
    assert model.shapes == {(3, 2, 8, 8)}
    with pytest.raises(UserError, match="crops 2"):
        evaluate(model, Greys([0], 3), (8, 8), crops=2)
    with pytest.raises(UserError, match="class3"):
        evaluate(model, Greys([5], 7), (8, 8))


def test_clips_as_the_model_was_trained() -> None:
    model = Answers(torch.zeros(1, 1), num_frames=5)
    assert DataConfig.of(model).sampling == Sampling(5, 1)
    model.pretrained_cfg = {"num_frames": 4, "frame_stride": 2.5}
    assert DataConfig.of(model).sampling == Sampling(4, 2.5)
    network = create_model("mvitv2_b_32x3", embed_dim=16, depths=(1, 1, 1, 1))
    assert DataConfig.of(network).sampling == Sampling(32, 3)
    assert DataConfig.of(nn.Identity()).sampling == Sampling(8, 4)


def _share(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    measured = evaluate(Answers(_table()), _source(), (10, 20), batch_size=2)
    (Path(folder) / str(rank)).write_text(repr((measured.scores, measured.count, sorted(measured.bad_images))))
    dist.destroy_process_group()


def _table() -> Tensor:
    return torch.randn(80, 7, generator=torch.Generator().manual_seed(0))


def _source() -> Greys:
    return Greys([0, 1, 2, 3, 4, 5, 6], 7, broken=(2,))


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_share, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    alone = evaluate(Answers(_table()), _source(), (10, 20), batch_size=2)
    for rank in range(2):
        scores, count, bad = eval((tmp_path / str(rank)).read_text())
        assert (count, bad) == (6, list(alone.bad_images))
        assert scores == pytest.approx(alone.scores, rel=1e-6)
