"""Classes are matched by name, never by position."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyres.data.classes import match_classes, match_outputs, name_labels, read_names
from anyres.errors import UserError


@pytest.mark.parametrize(
    ("known", "names", "places"),
    [
        (["cat", "dog", "cow"], ["cow", "cat"], [2, 0]),
        (["golden_retriever", "Tabby cat"], ["tabby-cat", "Golden Retriever"], [1, 0]),
        ([str(i) for i in range(12)], ["02", "10", "2"][:2], [2, 10]),
        (["01", "02", "10"], ["1", "10"], [0, 2]),
        (["a", "A"], ["A", "a"], [1, 0]),
        (["crane", "tench", "crane"], ["tench"], [1]),
        (["crane", "crane"], ["crane", "crane"], [0, 1]),
        (["caf\u00e9", "bar"], ["bar", "cafe\u0301"], [1, 0]),  # accents as macOS stores them
    ],
)
def test_names_that_mean_the_same_class(known: list[str], names: list[str], places: list[int]) -> None:
    assert match_classes(known, names, knower="the model", namer="the data") == places


@pytest.mark.parametrize(
    ("known", "names"),
    [
        (["cat", "dog"], ["dogs", "cats"]),
        (["Cat", "cAt", "dog"], ["CAT", "dog"]),  # which of the two?
        (["2", "1"], ["02", "2"]),  # both mean one
        (["cat", "dog"], ["0", "1"]),
        (["1", "2"], ["-1", "2"]),
        (["crane", "tench", "crane"], ["crane"]),
        ([], ["a", "b"]),
    ],
)
def test_no_guess_where_names_do_not_match(known: list[str], names: list[str]) -> None:
    with pytest.raises(UserError, match=r"the data has.*the model has.*names=FILE"):
        match_classes(known, names, knower="the model", namer="the data")


def test_outputs_without_names() -> None:
    def match(count: int, names: list[str]) -> list[int]:
        return match_outputs(count, names, knower="the model", namer="the data")

    assert match(1000, ["n01440764", "goldfish", "great_white_shark"]) == [0, 1, 2]
    assert match(1000, ["10", "2", "999"]) == [10, 2, 999]
    assert match(3, ["00", "2"]) == [0, 2]
    for count, names in ((1000, ["cats", "dogs"]), (1000, ["crane", "tench"]), (2, ["cat", "dog"]), (3, ["1", "3"])):
        with pytest.raises(UserError, match="cannot be matched"):
            match(count, names)


def test_files_of_names(tmp_path: Path) -> None:
    for name, text in (
        ("a.txt", "\ufeffcat\ndog \n\n"),
        ("a.json", '["cat", "dog"]'),
        ("b.json", '{"1": "dog", "0": "cat"}'),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_names(tmp_path / name) == ["cat", "dog"]
    (tmp_path / "cranes.txt").write_text("crane\ntench\ncrane")
    assert read_names(tmp_path / "cranes.txt") == ["crane", "tench", "crane"]
    wrong = ("", "\ncat", "cat\n\ndog", '{"0": "cat", "2": "dog"}', '{"a": "b"}', "3", "[1, 2]", "[" * 100_000)
    for number, text in enumerate(wrong):
        file = tmp_path / f"wrong{number}.{'txt' if number < 3 else 'json'}"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError):
            read_names(file)
    with pytest.raises(FileNotFoundError):
        read_names(tmp_path / "none.txt")


def test_labels_as_they_are_written() -> None:
    assert name_labels({"2", "00"}, "the data") == ["0", "1", "2"]
    assert name_labels({"dog", "cat"}, "the data") == ["cat", "dog"]
    assert name_labels({"99999999999", "a"}, "the data") == ["99999999999", "a"]  # a name: nobody has so many classes
    for labels in (["cat"], ["7"], ["7", "007"], []):
        with pytest.raises(UserError, match="at least two"):
            name_labels(labels, "the data")
