"""SIGINT and SIGTERM end a command with a sentence, at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from anyres.cli import main as cli

TINY = "model_args=embed_dim=16,depth=1,num_heads=2,patch_size=4"
ENDLESS = ["sizes=8", "epochs=100000", "batch_size=16", "epoch_size=32", "eval_every=1000", "warmup_epochs=0",
           "auto_augment=none", "workers=0", "precision=float32", "device=cpu", "--no-progress"]  # fmt: skip


def end(process: subprocess.Popen[str], number: int) -> tuple[int, list[str]]:
    """(exit code, what it said)."""
    process.send_signal(number)
    said = process.communicate(timeout=60)
    assert "Traceback" not in said[1], said[1]
    return process.returncode, [line for line in "".join(said).splitlines() if "anyres: " in line or "signal" in line]


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "anyres", "train", "resformer_tiny", TINY, *ENDLESS, f"output={folder}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_signal_during_the_start_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    for seconds, number, code in ((1.5, signal.SIGTERM, 143), (2.0, signal.SIGINT, 130)):
        process = start(tmp_path / "run")
        time.sleep(seconds)
        word = {143: "terminated", 130: "interrupted"}[code]
        assert end(process, number) == (code, [f"anyres: {word}."])
    assert not (tmp_path / "run").exists()


def test_a_signal_in_a_text_that_is_executed_keeps_the_exit_code(tmp_path: Path) -> None:
    """CPython remembers a KeyboardInterrupt that left such a text, and ends a module by SIGINT then."""
    (tmp_path / "tried.py").write_text("""
import os, signal, sys
from anyres.cli.main import interruptible
def command():
    exec("os.kill(os.getpid(), signal.SIGTERM)\\nfor _ in range(10**9): pass")
sys.exit(interruptible(command)())
""")
    command = [sys.executable, "-m", "tried"]
    assert subprocess.run(command, capture_output=True, check=False, cwd=tmp_path).returncode == 143


def test_a_run_stopped_before_its_first_validation_names_its_last_weights(tmp_path: Path) -> None:
    process = start(tmp_path / "run")
    while not (tmp_path / "run" / "summary.json").exists():
        time.sleep(0.05)
    time.sleep(1)
    code, said = end(process, signal.SIGTERM)
    assert code == 0
    last = tmp_path / "run" / "last"
    assert last.is_dir()
    assert said == [
        f"signal: not validated; weights in {last}; the same command continues the run",
        "anyres: saving and stopping after this step; a second signal stops at once.",
    ]
    assert not (tmp_path / "run" / "best").exists()
    assert list((tmp_path / "run" / "state").glob("step_*"))


def test_what_a_half_imported_package_raises_is_no_defect(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def command() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            raise RecursionError from None

    monkeypatch.setattr(cli, "parse", lambda *_: (command, {}))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main([]) == 143
    assert capfd.readouterr().err == "anyres: terminated.\n"
    assert signal.getsignal(signal.SIGTERM) == before
