"""What is recorded of a step beside its loss: the gradient norm, the wait for data, the memory."""

from __future__ import annotations

import errno
import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anyres.data import TrainLoader
from anyres.training import display, loop, records, train
from tests.training.helpers import small_config

SHORT: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0, "eval_every": 9, "eval_batch_size": 16}


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The norm of what the optimiser gets, of every step."""
    found: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: Any, *given: Any) -> Any:
        gradients = [parameter.grad.flatten() for group in self.param_groups for parameter in group["params"]]
        found.append(float(torch.cat(gradients).norm()))
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    return found


def test_the_gradient_norm_is_that_of_all_gradients(tmp_path: Path, norms: list[float]) -> None:
    row = train(small_config(tmp_path, **SHORT, accumulation=2)).rows[0]
    assert len(norms) == 3
    assert row["grad_norm"] == pytest.approx(sum(norms) / 3, rel=1e-5)


def test_the_gradient_norm_is_that_before_clipping(tmp_path: Path, norms: list[float]) -> None:
    once = {**SHORT, "epoch_size": 16}
    free = train(small_config(tmp_path / "free", **once)).rows[0]
    clipped = train(small_config(tmp_path / "clipped", **once, clip_grad=1e-3)).rows[0]
    assert norms == [pytest.approx(free["grad_norm"], rel=1e-5), pytest.approx(1e-3, rel=1e-2)]
    assert clipped["grad_norm"] == pytest.approx(free["grad_norm"], rel=1e-6)


def test_a_step_that_fp16_skips_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([1.0, math.inf, 4.0])
    monkeypatch.setattr(loop, "clip_gradients", lambda run: torch.tensor(next(given)))
    assert train(small_config(tmp_path, **SHORT)).rows[0]["grad_norm"] == 2.5


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip_grad", [None, 0.5])
def test_recording_a_step_does_not_wait_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_grad: float | None
) -> None:
    reads = Reads()

    def counted(function: Any) -> Any:
        def watched(*given: Any) -> Any:
            with reads:
                return function(*given)

        return watched

    for name in ("clip_gradients", "record_gradients", "record_batch", "log_step"):
        monkeypatch.setattr(loop, name, counted(getattr(loop, name)))
    train(small_config(tmp_path / "rarely", **SHORT, clip_grad=clip_grad, log_every=100))
    assert reads.count == 0
    train(small_config(tmp_path / "always", **SHORT, clip_grad=clip_grad, log_every=1))
    assert reads.count > 0


def slow(function: Any) -> Any:
    def slowed(*given: Any) -> Any:
        time.sleep(0.3)
        return function(*given)

    return slowed


def test_waiting_for_data_is_told_from_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = TrainLoader.epoch

    def slow_data(self: TrainLoader, *given: Any, **options: Any) -> Iterator[Any]:
        batches = epoch(self, *given, **options)
        while True:
            yield slow(next)(batches)

    with monkeypatch.context() as patch:
        patch.setattr(TrainLoader, "epoch", slow_data)
        row = train(small_config(tmp_path / "data", **SHORT)).rows[0]
    assert 0.9 / (row["seconds"] + 0.05) <= row["data_wait"] < 1
    monkeypatch.setattr(torch.optim.AdamW, "step", slow(torch.optim.AdamW.step))
    row = train(small_config(tmp_path / "step", **SHORT)).rows[0]
    assert row["data_wait"] < 1 - 0.9 / (row["seconds"] + 0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of the process")
def test_memory_without_cuda_is_the_largest_resident_set() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    expected = int(status["VmHWM"].split()[0]) / 2**20
    [(name, value)] = records.peak_memory(on("cpu")).items()
    assert name == "peak_resident_gib"
    assert 0.99 * expected <= value < 2 * expected  # more if the program that started this one had more


def test_memory_of_cuda_is_its_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: (3 + device.index) * 2**30)
    assert records.peak_memory(on("cuda:1")) == {"peak_allocated_gib": 4}


def on(device: str) -> Any:
    """As much of a run as says where it is."""
    return SimpleNamespace(accelerator=SimpleNamespace(device=torch.device(device)))


def test_steps_and_epochs_reach_the_trackers_and_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    row = train(small_config(tmp_path, **SHORT, log_every=2, progress=True)).rows[0]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "anyres"))
    events.Reload()
    tags = events.Tags()["scalars"]
    for name in ("loss", "loss_12", "lr", "grad_norm", "images_per_second", "data_wait", "peak_resident_gib"):
        assert f"train/{name}" in tags
        assert [event.step for event in events.Scalars(f"epoch/{name}")] == [3]
    assert [event.step for event in events.Scalars("train/grad_norm")] == [2]
    assert events.Scalars("epoch/grad_norm")[0].value == pytest.approx(row["grad_norm"])
    first, *_, last = capsys.readouterr().err.splitlines()
    about = "training resformer_tiny (0.01 M parameters) at 16, 12, 8: 1 epochs of 48 images in 3 batches"
    assert first.startswith(about)
    line = last
    assert line.startswith("epoch 1/1")
    assert row["views_per_second"] == pytest.approx(3 * row["images_per_second"], abs=1)
    assert f"gradient norm {row['grad_norm']:.3g}  peak {row['peak_resident_gib']:.2f} GiB" in line
    assert f"data wait {row['data_wait']:.0%}" in line


def test_a_state_that_has_no_norms_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As version 0.1 left it when it was stopped after an epoch's last step."""
    config = small_config(tmp_path, **SHORT, progress=True)

    def stop(run: Any, _: Any) -> None:
        run.status = "signal"
        loop.save(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "record_gradients", lambda *_: None)
        patch.setattr(loop, "finish_epoch", stop)
        assert train(config).status == "signal"
    monkeypatch.setattr(loop, "step", lambda *_: pytest.fail("nothing is left to train"))
    result = train(config)
    assert (result.status, "grad_norm" in result.rows[0]) == ("finished", False)


def test_a_long_epoch_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "LINE_SECONDS", (0.0, 0.0))
    train(small_config(tmp_path, **SHORT, progress=True))
    lines = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines[1:] == ["epoch 1/1, batch 1/3", "epoch 1/1, batch 2/3", "epoch 1/1"]


@pytest.mark.parametrize("intact", [0, 4])
def test_a_tracker_that_cannot_write_ends_the_run_without_a_traceback(
    intact: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

    write, entries = RecordWriter.write, 0

    def full(self: Any, *given: Any) -> None:
        nonlocal entries
        entries += 1
        if entries > intact:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, *given)

    monkeypatch.setattr(RecordWriter, "write", full)
    hook = threading.excepthook
    with pytest.raises(OSError, match="No space left"):
        train(small_config(tmp_path, **SHORT, epoch_size=160))
    assert "Traceback" not in capsys.readouterr().err
    assert threading.excepthook is hook
