from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyres.data import SizeSchedule, parse_sizes
from anyres.errors import UserError


def test_parse_sizes_reads_sides_pairs_and_ranges() -> None:
    assert parse_sizes("32,24,16") == [(32, 32), (24, 24), (16, 16)]
    assert parse_sizes(" 224x320 , 7X9,3×4") == [(224, 320), (7, 9), (3, 4)]
    assert parse_sizes("96:640:32") == [(side, side) for side in range(96, 641, 32)]
    assert parse_sizes("10:15:2, 8") == [(10, 10), (12, 12), (14, 14), (8, 8)]
    assert parse_sizes("5:5:1") == [(5, 5)]


@pytest.mark.parametrize(
    "text",
    ["", ",", "32,,16", "a", "0", "-5", "3.5", "32x", "x32", "1x2x3", "10:5:1", "1:5:0", "1:5", "1:2:3:4", "70000",
     "32 24", "9" * 5000, "1:65000:1", "٣", "32x32y", "1e3"],
)  # fmt: skip
def test_parse_sizes_refuses_in_one_sentence(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_sizes(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@given(st.text(alphabet="0123456789x:, a-", max_size=30))
def test_parse_sizes_never_fails_otherwise(text: str) -> None:
    try:
        sizes = parse_sizes(text)
    except UserError:
        return
    assert sizes
    assert all(1 <= height <= 65536 and 1 <= width <= 65536 for height, width in sizes)


@given(st.lists(st.tuples(st.integers(1, 65536), st.integers(1, 65536)), min_size=1, max_size=20))
def test_parse_sizes_reads_what_was_written(sizes: list[tuple[int, int]]) -> None:
    assert parse_sizes(",".join(f"{height}x{width}" for height, width in sizes)) == sizes


def test_replicate_shows_all_sizes_large_to_small() -> None:
    schedule = SizeSchedule([(16, 16), (24, 40), (32, 32)])
    assert schedule.sizes(0, 0) == schedule.sizes(3, 17) == [(32, 32), (24, 40), (16, 16)]


def test_the_sizes_of_a_step_slide_with_the_step() -> None:
    schedule = SizeSchedule([(s, s) for s in (16, 24, 32, 40)], sizes_per_step=2)
    seen = [[side for side, _ in schedule.sizes(0, step)] for step in range(5)]
    assert seen == [[40, 32], [32, 24], [24, 16], [40, 32], [32, 24]]


def test_sample_depends_on_seed_and_place_only() -> None:
    sizes = [(s, s) for s in (16, 24, 32)]
    one, same = (SizeSchedule(sizes, mode="sample", seed=5) for _ in range(2))
    drawn = [one.sizes(0, step) for step in range(300)]
    assert drawn == [same.sizes(0, step) for step in range(300)]
    assert drawn != [SizeSchedule(sizes, mode="sample", seed=6).sizes(0, step) for step in range(300)]
    counts = [drawn.count([size]) for size in sizes]
    assert sum(counts) == 300
    assert counts == [100, 100, 100]
    assert all({*drawn[place], *drawn[place + 1], *drawn[place + 2]} == set(sizes) for place in range(0, 300, 3))
    by_epoch = SizeSchedule(sizes, mode="sample", per="epoch", seed=5)
    assert all(by_epoch.sizes(2, step) == by_epoch.sizes(2, 0) for step in range(50))
    assert len({by_epoch.sizes(epoch, 0)[0] for epoch in range(50)}) == 3


@pytest.mark.parametrize("curriculum", [False, True])
def test_sample_may_draw_several_sizes(curriculum: bool) -> None:
    sizes = [(s, s) for s in (16, 24, 32, 40)]
    schedule = SizeSchedule(sizes, mode="sample", sizes_per_step=2, curriculum=curriculum, epochs=1)
    drawn = [tuple(schedule.sizes(0, step)) for step in range(300)]
    assert all(large[0] > small[0] for large, small in drawn)
    assert len(set(drawn)) == 6


def test_a_curriculum_goes_from_small_to_large() -> None:
    sizes = [(s, s) for s in (16, 24, 32, 40)]
    schedule = SizeSchedule(sizes, mode="sample", curriculum=True, epochs=10)

    def shares(epoch: int) -> list[float]:
        drawn = [schedule.sizes(epoch, epoch * 1000 + step)[0][0] for step in range(1000)]
        return [drawn.count(side) / 1000 for side in (16, 24, 32, 40)]

    first, middle, last = shares(0), shares(5), shares(9)
    assert first == sorted(first, reverse=True)
    assert last == sorted(last)
    assert max(middle) in middle[1:3]
    assert min(first + middle + last) > 0.04  # nothing is forgotten


@pytest.mark.parametrize(
    "arguments",
    [
        {"sizes": []},
        {"sizes": [(8, 8), (8, 8)]},
        {"sizes": [(0, 8)]},
        {"sizes": [(8, 8)], "mode": "all"},
        {"sizes": [(8, 8)], "per": "step"},
        {"sizes": [(8, 8)], "sizes_per_step": 2},
        {"sizes": [(8, 8)], "sizes_per_step": 0},
        {"sizes": [(8, 8), (9, 9)], "curriculum": True},
        {"sizes": [(8, 8)], "curriculum": True, "mode": "sample"},
    ],
)
def test_wrong_schedules_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        SizeSchedule(**arguments)
