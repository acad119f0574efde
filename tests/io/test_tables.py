"""Tables in parts: CSV, JSON lines and Parquet."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from anyres.errors import UserError
from anyres.io.tables import TABLES, Table, table_kind
from anyres.io.text import from_csv

COLUMNS = {"image": str, "rank": int, "share": float, "problem": str}
ROWS: list[list[Any]] = [
    ['a "b",\nc', 1, 0.25, None],
    ["=1+1", 2, 1 / 3, None],
    ["caf\udce9\x1b[31m", None, None, "no image\x07"],
    ["ä", -3, 1e-9, None],
]
READABLE = {"caf\udce9\x1b[31m": r"caf\xe9\x1b[31m", "no image\x07": r"no image\x07"}


def read(path: Path) -> list[list[Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        assert table.schema.names == list(COLUMNS)
        return [list(row.values()) for row in table.to_pylist()]
    if path.suffix == ".jsonl":
        return [list(json.loads(line).values()) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    header, *rows = csv.reader(path.open(encoding="utf-8", newline=""))
    assert header == list(COLUMNS)
    kinds: list[Any] = [from_csv, int, float, str]
    return [[kind(text) if text else None for kind, text in zip(kinds, row, strict=True)] for row in rows]


@pytest.mark.parametrize("suffix", TABLES)
@pytest.mark.parametrize("cuts", [(4,), (1, 4), (0, 1, 2, 3, 4)])
def test_joined_parts_are_the_whole(suffix: str, cuts: tuple[int, ...], tmp_path: Path) -> None:
    table: Table = TABLES[suffix](COLUMNS)
    expected = [[READABLE.get(value, value) for value in row] for row in ROWS]
    parts = []
    for number, (start, stop) in enumerate(zip((0, *cuts), cuts, strict=False)):
        parts.append(tmp_path / f"{number}{suffix}")
        table.write(ROWS[start:stop], parts[-1])
        assert read(parts[-1]) == expected[start:stop]
    table.join(parts, tmp_path / f"whole{suffix}")
    assert read(tmp_path / f"whole{suffix}") == expected


def test_parquet_is_joined_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet

    monkeypatch.setattr("anyres.io.tables.ROW_GROUP", 3)
    table = TABLES[".parquet"](COLUMNS)
    for number in range(5):
        table.write(ROWS[:2], tmp_path / f"{number}.parquet")
    table.join((tmp_path / f"{number}.parquet" for number in range(5)), tmp_path / "whole.parquet")
    about = parquet.ParquetFile(tmp_path / "whole.parquet").metadata
    assert [about.row_group(place).num_rows for place in range(about.num_row_groups)] == [4, 4, 2]


def test_the_ending_of_a_name_decides_and_others_are_refused() -> None:
    assert table_kind("a/B.CSV") is TABLES[".csv"]
    with pytest.raises(UserError, match=r"a\.json does not end in \.csv, \.jsonl or \.parquet"):
        table_kind("a.json")
