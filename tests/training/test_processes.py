"""Two processes with gloo against one; devices and precisions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anyres.training import state, train
from anyres.training.processes import _pick_precision
from tests.training.distributed import OTHERS
from tests.training.helpers import SAME_EVERYWHERE, metrics, small_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes: ddp, fsdp, resumed."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run(
        [*command, "-m", "tests.training.distributed", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train(small_config(folder, **SAME_EVERYWHERE))
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "resumed"])
def test_two_processes_give_the_losses_and_weights_of_one(one: Path, two: Path, kind: str) -> None:
    rows, expected = metrics(two / kind), metrics(one)
    assert len(rows) == len(expected) == 2
    for row, single in zip(rows, expected, strict=True):
        for name, value in single.items():
            assert float(row[name]) == pytest.approx(float(value), rel=2e-5, abs=1e-6), name
    for name in ("last", "best"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (two / kind, one))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_other_tasks_can_be_sharded(two: Path, name: str) -> None:
    ours, theirs = (load_file(two / name / kind / "last" / "model.safetensors") for kind in ("fsdp", "ddp"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_one_process_continues_what_two_began(one: Path, two: Path) -> None:
    """The state of the sharded run has whole tensors, and the position counts images of all processes."""
    position, content = state.load_state(state.saved_states(two / "ddp")[0])
    assert (position.epoch, position.updates, len(content["ranks"])) == (2, 6, 2)
    config = small_config(two / "ddp", **SAME_EVERYWHERE, ema_decay=0.5)
    assert train(config).status == "finished"


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [_pick_precision(name, cpu=True) for name in ("float32", "bf16")] == ["no", "bf16"]
    for amx, avx, expected in ((True, False, "bf16"), (False, True, "no"), (False, False, "no")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda value=amx: value)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda value=avx: value)
        assert _pick_precision("auto", cpu=True) == expected
