"""The processes that share a list of files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch.distributed import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from anyres.errors import UserError

PAUSE = 0.2
"""Seconds between two looks at the store. The store's own waiting would not let signals through."""
ENDED = (
    "another process of this run has ended, so this one ends too; the other's own message says why. "
    "The same command continues the run"
)


class Peers:
    """The processes that torchrun started, or this one alone, and the numbers that they count together.

    Attributes:
        rank: number of this process; 0 is the first.
        world: number of processes.
        local_rank: number of this process on its machine.

    Raises:
        UserError: if the environment names several processes and this one cannot reach the first.
    """

    def __init__(self) -> None:
        self.rank, self.world, self.local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        self._store: Store = HashStore()
        if self.world > 1:
            try:
                self._store = next(iter(rendezvous("env://")))[0]
            except (ValueError, RuntimeError) as error:
                raise UserError(
                    f"WORLD_SIZE is {self.world}, but the processes do not find each other ({error}): start them with "
                    "torchrun"
                ) from error

    def add(self, name: str, amount: int = 1) -> int:
        """Add to a number that all processes share, which starts at 0, and return the sum."""
        try:
            return int(self._store.add(name, amount))
        except RuntimeError as error:
            raise UserError(ENDED) from error

    def wait(self, name: str, amount: int = 1) -> None:
        """Wait until a shared number is at least `amount`. Raises UserError if a process fails before that."""
        while self.add(name, 0) < amount:
            if self.add("failed", 0):
                raise UserError(ENDED)
            time.sleep(PAUSE)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let those that wait know if this process fails in the block."""
        try:
            yield
        except BaseException:
            with suppress(UserError):
                self.add("failed")
            raise
