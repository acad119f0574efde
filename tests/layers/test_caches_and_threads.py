"""The caches of tables under threads that evict each other's entries."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from anyres.layers.parameter_cache import cached_for_parameter
from anyres.layers.size_cache import cached_by_size


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def hammer(check: Callable[[int], None]) -> None:
    """`check` of 1..6 from eight threads at once, so that a cache of two entries is always changing."""

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(400):
            check(draw.randint(1, 6))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_tables_by_size() -> None:
    made = cached_by_size(maximum=2)(lambda size: torch.full((2,), size))
    hammer(lambda size: torch.testing.assert_close(made(size), torch.full((2,), size)))
    assert len(made.cache) == 2  # type: ignore[attr-defined]  # there for tests


def test_tables_from_parameters() -> None:
    made = cached_for_parameter(maximum=2)(lambda parameter, size: parameter * size)
    kept = torch.nn.Parameter(torch.ones(2))

    @torch.no_grad()
    def check(size: int) -> None:
        passing = torch.nn.Parameter(torch.full((2,), 3.0))
        assert torch.equal(made(kept, size), torch.full((2,), 1.0 * size))
        assert torch.equal(made(passing, size), torch.full((2,), 3.0 * size))

    hammer(check)
