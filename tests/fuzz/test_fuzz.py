"""Damaged files of every kind, strange options and kills: never a traceback, a hang or a lost byte.

Everything runs in the harness's own process (`python -m tests.fuzz`), since forks need one without threads.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.core import HEADING
from tests.fuzz.kinds import KINDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits of memory by /proc")

Harness = Callable[..., None]


@pytest.fixture
def harness(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None], capfd: pytest.CaptureFixture[str]
) -> Harness:
    """Runs kinds; fails with what they found. The counts come at the end of pytest's report."""

    def run(*words: str) -> None:
        words = (*words, "--seed", str(request.config.getoption("--fuzz-seed")))
        command = [sys.executable, "-m", "tests.fuzz", *words]
        with capfd.disabled():  # progress, on the error stream
            done = subprocess.run(
                command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=False
            )
        stories, heading, counts = done.stdout.rpartition(HEADING)
        record_property("fuzz", heading + counts)
        assert done.returncode == 0, stories

    return run


@pytest.mark.timeout(1200)
def test_short_form(harness: Harness) -> None:
    harness(*(name for name, kind in KINDS.items() if kind.short), "--short")


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_long_form(harness: Harness, kind: str, request: pytest.FixtureRequest) -> None:
    case = request.config.getoption("--fuzz-case")
    only = [] if case is None else ["--case", str(case)]
    harness(kind, "--scale", str(request.config.getoption("--fuzz-scale")), *only)
