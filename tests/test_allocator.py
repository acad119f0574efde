"""The process keeps freed memory where it can and is allowed to."""

from __future__ import annotations

import subprocess
import sys

import pytest

PAGES = """
import resource, sys
from anyres.allocator import keep_memory
import torch
print(keep_memory())
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.ones(8 << 20)
found = []
for _ in range(8):
    before = faults()
    x * 2
    found.append(faults() - before)
print(min(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="concerns glibc")
@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"ANYRES_KEEP_MEMORY": "0"}, False)])
def test_freed_memory_is_used_again_unless_switched_off(
    environment: dict[str, str], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("resource")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ran = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    answer, faults = ran.stdout.split()
    if answer == "False" and kept:
        pytest.skip("not glibc's allocator")
    assert answer == str(kept)
    pages = 32 * 1024 // 4  # of 32 MB
    assert int(faults) < 100 if kept else int(faults) > pages // 16  # in huge pages, there are fewer
