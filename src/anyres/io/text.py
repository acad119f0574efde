"""Text that came from elsewhere (names of files and classes, what other libraries say), made fit for where it goes."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable

_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of controls, marks that format or reorder, surrogates, and ends of lines and paragraphs."""
_JOINERS = "\u200c\u200d"
"""Harmless marks of formatting: emoji and several scripts cannot be spelt without them."""
_FORMULA = re.compile(r"'|\s*[=+\-@＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def printable(text: object, keep: str = "") -> str:
    """The text in one line, where every character shows itself and does nothing else: controls (such as those that
    colour a terminal or clear it), ends of lines, marks that reverse what follows and bytes of a file name that are no
    UTF-8 become escapes such as `\\x1b`. Characters in `keep` stay."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        escaped(char) if unicodedata.category(char) in _UNSEEN and char not in _JOINERS and char not in keep else char
        for char in text
    )


def escaped(char: str) -> str:
    """A character as an escape, as in Python; a byte of a file name (surrogateescape) as that byte, such as `\\xff`."""
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters of the text, with "…" in place of its middle."""
    if len(text) <= limit:
        return text
    tail = limit // 2
    return text[: limit - 1 - tail] + "…" + text[-tail:]


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows as CSV. Numbers stay as they are. Texts are `printable` but for ends of lines, and a text that a spreadsheet
    would take for a formula (it begins with `=`, `+`, `-` or `@` and is no number) gets an apostrophe in front, as does
    one that begins with an apostrophe: `from_csv` takes it off again."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(map(_cell, row) for row in rows)
    return buffer.getvalue()


def from_csv(cell: str) -> str:
    """The text that `csv_text` made a cell of."""
    return cell.removeprefix("'")


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = printable(value, keep="\n")
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text
