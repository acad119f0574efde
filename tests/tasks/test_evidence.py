from __future__ import annotations

import json
import math

import numpy as np
import pytest

from anyres.tasks.evidence import Answers, Regions, holm, mcnemar, p_value, student, unpack, wilson


def answers(right: list[int], start: int = 0) -> Answers:
    """Answers to items of class 0: 1 where they are right."""
    places = np.arange(start, start + len(right), dtype=np.int32)
    return Answers(places, np.zeros_like(places), 1 - np.array(right, dtype=np.int32), np.full_like(places, 3))


def test_statistics_by_the_book() -> None:
    assert wilson(7, 10) == pytest.approx((39.6778, 89.2209), abs=1e-3)
    assert mcnemar(3, 15) == pytest.approx(0.00753784, abs=1e-7)  # 2 · Σ C(18, k) / 2^18 for k up to 3
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1
    for t, free, expected in [(2.1, 1, 0.282926), (2.1, 2, 0.170550), (2.5, 4, 0.066767), (3.3, 5, 0.021476)]:
        assert student(t, free) == pytest.approx(expected, abs=1e-6)
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])


def test_answers_count_by_class() -> None:
    every = np.array([0, 1, 2, 3], dtype=np.int32)
    evidence = Answers(every, np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1]), np.full(4, 3))
    assert evidence.by_class().tolist()[:2] == [50, 100]
    assert math.isnan(evidence.by_class()[2])
    assert evidence.confusion().tolist() == [[1, 0, 1], [0, 2, 0], [0, 0, 0]]
    assert evidence.interval() == wilson(3, 4)


def test_evidence_survives_json_and_processes() -> None:
    parts = [answers([1, 0, 1]), answers([0, 0], start=3)]
    joined = Answers.join(parts[::-1])
    assert joined.places.tolist() == [0, 1, 2, 3, 4]
    read = unpack(json.loads(json.dumps(joined.pack())))
    assert isinstance(read, Answers)
    assert read.right.tolist() == [True, False, True, False, False]


def test_a_difference_is_tested_on_the_items_that_both_saw() -> None:
    ours, theirs = answers([1] * 30), answers([1] * 18 + [0] * 12)
    assert p_value([ours], [theirs]) == mcnemar(12, 0)
    assert p_value([ours], [ours]) == 1
    assert p_value([answers([1] * 10)], [theirs]) == 1  # all that differ are left out
    assert p_value([answers([1], start=90)], [theirs]) is None


def test_runs_that_scatter_support_no_difference() -> None:
    ours = [answers([1] * n + [0] * (200 - n)) for n in (150, 152, 151)]
    near = [answers([1] * n + [0] * (200 - n)) for n in (110, 111, 112)]
    wild = [answers([1] * n + [0] * (200 - n)) for n in (20, 111, 190)]
    assert p_value(ours, near) < 0.001  # type: ignore[operator]
    assert p_value(ours, wild) > 0.05  # type: ignore[operator]


def regions(found: list[list[int]]) -> Regions:
    array = np.array(found, dtype=np.int32)
    return Regions(np.arange(len(array), dtype=np.int32), array, np.full_like(array, 100))


def test_regions_are_resampled_by_image() -> None:
    rng = np.random.default_rng(0)
    good = regions(rng.integers(60, 80, (50, 3)).tolist())
    bad = regions((good.found - 10).tolist())
    low, high = good.interval()
    assert low < float(np.mean(good.by_class())) < high
    assert high - low < 5
    assert p_value([good], [bad]) < 0.01  # type: ignore[operator]
    assert p_value([good], [good]) == 1
