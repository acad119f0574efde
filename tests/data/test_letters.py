"""The built-in letters."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from anyres.data.letters import FONTS, Letters


def drawn(letters: Letters, index: int, scale: float) -> Image.Image:
    return letters.item(index).data.draw(scale)  # type: ignore[union-attr]


def test_every_letter_has_its_share_of_both_splits() -> None:
    for split, count in (("train", 200), ("val", 40)):
        letters = Letters(split)
        labels = [letters.item(index).label for index in range(len(letters))]
        assert np.bincount(labels).tolist() == [count] * 26
    assert not {*FONTS["train"]} & {*FONTS["val"]}


@pytest.mark.parametrize("index", [0, 777, 1039])
def test_a_letter_is_the_same_image_at_every_scale_with_more_detail_when_large(index: int) -> None:
    letters = Letters("val")
    large, again, small = drawn(letters, index, 1.0), drawn(letters, index, 1.0), drawn(letters, index, 0.25)
    assert large.size == (256, 256)
    assert small.size == (64, 64)
    assert large.tobytes() == again.tobytes()
    shrunk = np.asarray(large.resize((64, 64), Image.Resampling.BOX), dtype=float)
    assert np.abs(shrunk - np.asarray(small, dtype=float)).mean() < 12
    other = np.asarray(drawn(letters, index - 1 if index else 1, 0.25), dtype=float)
    assert np.abs(shrunk - other).mean() > 25
    enlarged = np.asarray(small.resize((256, 256), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(enlarged - np.asarray(large, dtype=float)).mean() > 2
