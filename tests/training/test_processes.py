"""Two processes with gloo against one; kills of one of them; devices and precisions."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from anyres.cli.main import main
from anyres.training import state, train
from anyres.training.processes import _pick_precision
from tests.training.distributed import OTHERS
from tests.training.helpers import SAME_EVERYWHERE, SMALL, metrics, small_config

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


def same_run(folder: Path, whole: Path) -> None:
    """The same but for the order of sums."""
    rows, expected = metrics(folder), metrics(whole)
    assert len(rows) == len(expected)
    for row, single in zip(rows, expected, strict=True):
        for name, number in single.items():
            assert row[name] == number or float(row[name]) == pytest.approx(float(number), rel=2e-5, abs=1e-6), name
    for name in ("last", "best"):
        ours, theirs = (load_file(place / name / "model.safetensors") for place in (folder, whole))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "resumed"])
def test_two_processes_give_the_losses_and_weights_of_one(one: Path, two: Path, kind: str) -> None:
    same_run(two / kind, one)


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


# Kills ----------------------------------------------------------------------------------------------------------------


def run_rank(recipe: Path, rank: int, world: int, port: int, log: Path) -> None:
    """One process of a run, as somebody starts it without torchrun."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    sys.exit(main(["train", f"recipe={recipe}"]))


class Launcher:
    """Starts the processes of a run over and over."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.log, self.recipe = folder / "run", folder / "log", folder / "recipe.yaml"
        options = {**SMALL, **SAME_EVERYWHERE, **options, "output": str(self.folder)}
        self.recipe.write_text(yaml.safe_dump(options))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["anyres.training.loop", "sklearn.datasets", "tests.training.test_processes"]
        )

    def start(self, world: int) -> list[BaseProcess]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes: list[BaseProcess] = []
        for rank in range(world):
            process = self.context.Process(target=run_rank, args=(self.recipe, rank, world, port, self.log))
            process.start()
            processes.append(process)
        return processes

    def kill_one(self, world: int, victim: int, when: Callable[[], None]) -> None:
        """Kill a process; the others must end within 30 seconds, in a sentence."""
        self.log.unlink(missing_ok=True)
        processes = self.start(world)
        when()
        processes[victim].kill()
        began = time.monotonic()
        for process in processes:
            process.join(60)
        seconds = time.monotonic() - began
        assert processes.pop(victim).exitcode == -signal.SIGKILL, "the run ended before the kill: make it longer"
        assert [process.exitcode for process in processes] == [2] * (world - 1)
        assert seconds < 30
        error = self.log.read_text()
        assert "Traceback" not in error
        ended = [line for line in error.splitlines() if line.startswith("anyres: ") and "process" in line]
        assert len(ended) == world - 1, error

    def finish(self, world: int) -> None:
        processes = self.start(world)
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * world, self.log.read_text()

    def wait_for_state(self) -> None:
        before = state.saved_states(self.folder)[:1]
        while state.saved_states(self.folder)[:1] == before:
            time.sleep(0.005)


LONGER = {"epochs": 4, "epoch_size": 96, "batch_size": 24, "eval_every": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of `LONGER` in one process leaves that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train(small_config(folder, **SAME_EVERYWHERE | LONGER))
    return folder


def test_killing_a_process_ends_the_other_and_any_number_continues(whole: Path, tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, **LONGER, save_every_steps=1)
    launcher.kill_one(2, victim=0, when=launcher.wait_for_state)
    launcher.kill_one(2, victim=1, when=launcher.wait_for_state)
    launcher.kill_one(3, victim=2, when=launcher.wait_for_state)
    launcher.finish(1)
    same_run(launcher.folder, whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_at_any_moment_end_the_others_and_any_number_continues(tmp_path: Path) -> None:
    longer = {**LONGER, "epochs": 40}
    train(small_config(tmp_path / "whole", **SAME_EVERYWHERE | longer))
    launcher = Launcher(tmp_path, **longer, save_every_steps=1)
    dice = random.Random(3)

    def at_any_moment() -> None:
        if dice.random() < 0.6:
            launcher.wait_for_state()
        time.sleep(dice.uniform(0, 2))

    for number in range(24):
        world = 2 + number % 2
        launcher.kill_one(world, dice.randrange(world), at_any_moment)
    launcher.finish(3)
    same_run(launcher.folder, tmp_path / "whole")


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [_pick_precision(name, cpu=True) for name in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    for amx, avx, expected in ((True, False, "bfloat16"), (False, True, "float32"), (False, False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda value=amx: value)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda value=avx: value)
        assert _pick_precision("auto", cpu=True) == expected
