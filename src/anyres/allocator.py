"""How the C library handles freed memory."""

from __future__ import annotations

import ctypes
import os
from functools import cache

SWITCH = "ANYRES_KEEP_MEMORY"
# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_SPARE = 64 << 20


@cache
def keep_memory() -> bool:
    """Let this process keep the memory of freed activations, and return whether it does from now on.

    By default, glibc returns large blocks to the system when they are freed, and every page of the next layer's
    activations is then mapped and zeroed again: up to a third of the time of a forward pass on a CPU (docs/speed.md).
    The price is that the process holds on to its peak memory. The commands and `Predictor` call this. Set
    ANYRES_KEEP_MEMORY=0 to turn it off; other C libraries and processes with another allocator are left as they are.
    """
    if os.environ.get(SWITCH) == "0" or os.environ.get("LD_PRELOAD"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018  # other C libraries give mallopt's parameters no meaning
    except (AttributeError, OSError, TypeError):
        return False
    never = (1 << 31) - 1
    return all(mallopt(*pair) for pair in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, never), (_TOP_PAD, _SPARE)))
