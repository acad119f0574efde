"""Times the forward pass of two versions of the package in turn.

    git worktree add ../before COMMIT
    uv run python benchmarks/versions.py ../before/src src

Each version lives in a process of its own, one thread each; they take turns, so that a machine that others use too
disturbs both alike. A ratio is the median over the rounds of the second version's time over the first's: below 1
means that the second is faster. Each setting is timed twice: with the allocator as it is, and with memory kept by the
process.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

MODELS = ["resformer_small", "deit_small", "swin_tiny", "pvt_v2_b2", "mvitv2_tiny", "cmt_small", "mpvit_small",
          "dat_tiny"]  # fmt: skip
SETTINGS = [(224, 2), (224, 8), (384, 2)]
KEPT = {name: str(1 << 32) for name in ("MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")}
WORKER = """
import sys, time, torch, anyres
torch.set_num_threads(1)
kept = [None, None]
for line in sys.stdin:
    name, size, batch = line.split()
    if kept[0] != name:
        torch.manual_seed(0)
        kept = [name, anyres.create_model(name).eval()]
    images = torch.randn(int(batch), 3, int(size), int(size))
    with torch.inference_mode():
        began = time.perf_counter()
        kept[1](images)
        print(time.perf_counter() - began, flush=True)
"""


class Version:
    """A process with one version of the package."""

    def __init__(self, source: Path, kept: bool) -> None:
        environment = {**os.environ, "PYTHONPATH": str(source.resolve()), **(KEPT if kept else {})}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def seconds(self, name: str, size: int, batch: int) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(name, size, batch, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    all_ratios: dict[tuple[bool, int, int], list[float]] = {}
    titles = [f"{size} b{batch}{' kept' * kept}" for kept in (False, True) for size, batch in SETTINGS]
    print(f"{'model':24}" + "".join(f"{title:>13}" for title in titles))
    for name in options.models:
        line = f"{name:24}"
        for kept in (False, True):
            versions = [Version(source, kept) for source in (options.first, options.second)]
            for size, batch in SETTINGS:
                ratios = []
                for number in range(options.rounds + 1):
                    first, second = (version.seconds(name, size, batch) for version in versions)
                    if number:  # the first round fills caches
                        ratios.append(second / first)
                all_ratios.setdefault((kept, size, batch), []).append(statistics.median(ratios))
                line += f"{statistics.median(ratios):13.2f}"
            for version in versions:
                version.process.terminate()
        print(line, flush=True)
    means = [math.exp(statistics.fmean(map(math.log, ratios))) for ratios in all_ratios.values()]
    print(f"{'geometric mean':24}" + "".join(f"{mean:13.2f}" for mean in means))


if __name__ == "__main__":
    main()
