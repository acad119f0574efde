"""A path that does not exist is told before torch is imported, which takes seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from anyres.cli.paths import check_data, check_models

COMMANDS = (
    "train data=no/such",
    "train data=nothing",
    "train val_data=no/such",
    "segment train data=no/such",
    "detect test a/b.pth",
    "test runs/no data=digits",
    "predict runs/no no.png",
    "predict name.safetensors .",
    "sweep A:=runs/no",
    "sweep deit_tiny data=no/such",
)
_TRY = """
import sys
from anyres.cli.main import main
for words in sys.argv[1:]:
    assert main(words.split()) == 2, words
assert "torch" not in sys.modules
"""
BEGINNINGS = ("anyres: there is no dataset '", "anyres: There is no file or folder ")


def test_a_path_that_does_not_exist_is_told_at_once() -> None:
    ran = subprocess.run([sys.executable, "-c", _TRY, *COMMANDS], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stderr.splitlines()
    assert len(lines) == len(COMMANDS)
    assert all(line.startswith(BEGINNINGS) for line in lines)


@pytest.mark.parametrize("spec", ["digits", "letters", "hf:mnist", "wds:a-{000..146}.tar", ".", None])
def test_data_that_may_exist_pass(spec: str | None) -> None:
    check_data(spec)


@pytest.mark.parametrize("spec", ["deit_tiny", "timm:a/b", "hf-hub:a/b", "local-dir:a/b", "x=a/b.pth", "L:=timm:x"])
def test_models_that_may_exist_pass(spec: str) -> None:
    check_models([spec])
