"""Started by torchrun in test_processes.py: the small run under DDP, then sharded, then stopped and resumed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from anyres.training import train
from tests.training.helpers import SAME_EVERYWHERE, small_config


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    train(small_config(folder / "ddp", **SAME_EVERYWHERE, ema_decay=0.5))
    train(small_config(folder / "fsdp", **SAME_EVERYWHERE, fsdp=True))
    stopped = small_config(folder / "resumed", **SAME_EVERYWHERE, fsdp=True, time_limit=1e-9)
    assert train(stopped).status == "time limit"
    train(small_config(folder / "resumed", **SAME_EVERYWHERE, fsdp=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
