"""Items prepared in worker processes."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Sequence

import numpy as np
import pytest

from anyres.data import BadImage, EvalBatch, Item
from anyres.data.prepared import prepared
from anyres.data.samples import EvalSample
from anyres.errors import UserError


class Large:
    """Makes a megabyte of every item; items may be bad, or need something of the user."""

    def prepare(self, item: Item) -> EvalSample:
        if isinstance(item.data, BadImage):
            raise item.data
        if item.data == b"depth":
            raise UserError("give the bit_depth")
        return EvalSample([np.full((1000, 1000), int(item.name) % 256, np.uint8)], (1000, 1000))

    def shape(self, sample: EvalSample) -> None: ...

    def collate(self, items: Sequence[Item], samples: Sequence[EvalSample]) -> EvalBatch:
        raise AssertionError("only the main process collates")


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_and_problems_come_in_order(workers: int) -> None:
    items = [Item(str(number), BadImage("a", "bad") if number % 7 == 5 else b"", None) for number in range(30)]
    for place, (item, sample) in enumerate(prepared(Large(), iter(items), workers)):
        assert item is items[place]
        if place % 7 == 5:
            assert isinstance(sample, BadImage)
            assert sample.reason == "bad"
        else:
            assert isinstance(sample, EvalSample)
            assert isinstance(sample.pixels[0], np.ndarray)
            assert (sample.pixels[0] == place).all()
    assert place == 29
    with pytest.raises(UserError, match="give the bit_depth"):
        list(prepared(Large(), [*items, Item("30", b"depth", None)], workers))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_workers_end_after_their_main_process_was_killed() -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for _ in prepared(Large(), (Item(str(number), b"", None) for number in range(1000)), workers=2):
            os.write(write, b"x")
            time.sleep(60)
        os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"x"
    time.sleep(0.5)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert select.select([read], [], [], 60)[0], "someone still holds the other end"
    assert os.read(read, 1) == b""
    os.close(read)
