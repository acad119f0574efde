"""Tables as CSV, JSON lines or Parquet files, written in parts that are joined later."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from anyres.errors import UserError
from anyres.extras import require
from anyres.io.text import csv_text, printable

ROW_GROUP = 1 << 16
"""Rows of a Parquet file that are read and written together."""


class Table(ABC):
    """A kind of file for tables with certain columns.

    Args:
        columns: title → type of the values, str, int or float; any value may also be None.
    """

    typed: ClassVar[bool] = True
    """Whether numbers are written as numbers; if not, rows consist of text."""

    def __init__(self, columns: Mapping[str, type]) -> None:
        self.columns = dict(columns)

    @abstractmethod
    def write(self, rows: Sequence[Sequence[Any]], path: Path) -> None:
        """Write a whole table."""

    @abstractmethod
    def join(self, parts: Iterable[Path], path: Path) -> None:
        """Write one table with the rows of several; only a few of the rows are in memory at a time."""


class TextTable(Table):
    """A table whose rows can be written one after the other: a `header`, and then the `text` of rows."""

    header: str = ""

    @abstractmethod
    def text(self, rows: Sequence[Sequence[Any]]) -> str:
        """Return the rows as lines."""

    def write(self, rows: Sequence[Sequence[Any]], path: Path) -> None:
        path.write_text(self.header + self.text(rows), encoding="utf-8")

    def join(self, parts: Iterable[Path], path: Path) -> None:
        header = self.header.encode()
        with path.open("wb") as target:
            target.write(header)
            for part in parts:
                with part.open("rb") as source:
                    source.seek(len(header))
                    shutil.copyfileobj(source, target)


class Csv(TextTable):
    """CSV with a header; see `csv_text` for what is escaped."""

    typed = False

    def __init__(self, columns: Mapping[str, type]) -> None:
        super().__init__(columns)
        self.header = csv_text([self.columns])

    def text(self, rows: Sequence[Sequence[Any]]) -> str:
        return csv_text(rows)


class JsonLines(TextTable):
    """One JSON object per row and line. Unsafe characters in texts are escaped as in CSV."""

    def text(self, rows: Sequence[Sequence[Any]]) -> str:
        lines = (dict(zip(self.columns, map(_clean, row), strict=True)) for row in rows)
        return "".join(f"{json.dumps(line, ensure_ascii=False, allow_nan=False)}\n" for line in lines)


class Parquet(Table):
    """Parquet, which needs pyarrow. Unsafe characters in texts are escaped as in CSV."""

    def __init__(self, columns: Mapping[str, type]) -> None:
        super().__init__(columns)
        pyarrow = require("pyarrow")
        types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
        self.schema = pyarrow.schema([(title, types[kind]) for title, kind in self.columns.items()])

    def write(self, rows: Sequence[Sequence[Any]], path: Path) -> None:
        values = [[_clean(row[place]) for row in rows] for place in range(len(self.columns))]
        arrays = dict(zip(self.columns, values, strict=True))
        require("pyarrow.parquet").write_table(require("pyarrow").table(arrays, self.schema), path)

    def join(self, parts: Iterable[Path], path: Path) -> None:
        pyarrow, parquet = require("pyarrow"), require("pyarrow.parquet")
        with parquet.ParquetWriter(path, self.schema) as writer:
            tables: list[Any] = []
            for part in parts:
                tables.append(parquet.read_table(part, schema=self.schema))
                if sum(len(table) for table in tables) >= ROW_GROUP:
                    writer.write_table(pyarrow.concat_tables(tables))
                    tables = []
            if tables:
                writer.write_table(pyarrow.concat_tables(tables))


TABLES: dict[str, type[Table]] = {".csv": Csv, ".jsonl": JsonLines, ".parquet": Parquet}
"""Ending of a file's name → its kind."""


def table_kind(path: str | Path) -> type[Table]:
    """Return the kind of table that a file's name asks for. Raises UserError if it asks for none."""
    suffix = Path(path).suffix.lower()
    if suffix not in TABLES:
        raise UserError(f"{path} does not end in {', '.join(list(TABLES)[:-1])} or {list(TABLES)[-1]}: choose one")
    return TABLES[suffix]


def _clean(value: Any) -> Any:
    return printable(value, keep="\n") if isinstance(value, str) else value
