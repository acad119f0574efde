"""Random numbers that depend on what is drawn, never on who draws it.

Everything random in this room comes from a generator named by its purpose and place, such as ("sample", seed, epoch,
position). So the number of workers, the number of processes and a resume in the middle of an epoch change nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator(*key: str | int) -> random.Random:
    """Return the random generator of this key. A text seed goes through SHA-512, so neighbouring keys are unrelated."""
    return random.Random("/".join(map(str, key)))


def seed_globals(seed: int) -> None:
    """Seed the three global generators that timm's and torchvision's transforms draw from; `seed` is below 2**32."""
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed: that one also seeds the accelerators, which costs more than a small image.
    torch.default_generator.manual_seed(seed)


@contextmanager
def kept_globals() -> Iterator[None]:
    """Put the three global generators back as they were on leaving."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
