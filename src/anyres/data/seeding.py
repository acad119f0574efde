"""Random numbers that depend on what is drawn, never on which process draws it.

All randomness in `anyres.data` comes from generators keyed by purpose and position, such as ("sample", seed, epoch,
position). The results are therefore the same for any number of workers or processes, and after a resume in the middle
of an epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator(*key: str | int) -> random.Random:
    """Return the random generator for a key. Text seeds are hashed with SHA-512, so similar keys give unrelated
    streams."""
    return random.Random("/".join(map(str, key)))


def seed_globals(seed: int) -> None:
    """Seed the three global generators that timm's and torchvision's transforms use; `seed` must be below 2**32."""
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which also seeds the accelerators and takes longer than processing a small image.
    torch.default_generator.manual_seed(seed)


@contextmanager
def kept_globals() -> Iterator[None]:
    """Restore the three global generators on exit."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
