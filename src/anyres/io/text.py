"""Making untrusted text (file and class names, messages of other libraries) safe for terminals, tables and pages."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable

_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of control, formatting and surrogate characters, and of line and paragraph separators."""
_JOINERS = "\u200c\u200d"
"""Harmless formatting characters that emoji and several scripts need."""
_FORMULA = re.compile(r"'|\s*[=+\-@＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def printable(text: object, keep: str = "") -> str:
    """Return the text as one line of visible characters, with everything else escaped.

    Control characters (which could clear or colour a terminal), line breaks, characters that reverse the following
    text, and file name bytes that are not UTF-8 become escapes such as `\\x1b`. Characters in `keep` are left
    unchanged.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        escaped(char) if unicodedata.category(char) in _UNSEEN and char not in _JOINERS and char not in keep else char
        for char in text
    )


def escaped(char: str) -> str:
    """Escape a character as Python does; a file name byte (surrogateescape) becomes that byte, such as `\\xff`."""
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def shorten(text: str, limit: int) -> str:
    """Shorten a text to at most `limit` characters, with "…" in place of its middle."""
    if len(text) <= limit:
        return text
    tail = limit // 2
    return text[: limit - 1 - tail] + "…" + text[-tail:]


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Format rows as CSV. Numbers stay as they are, and strings are made `printable`, keeping line breaks.

    A string that a spreadsheet would run as a formula (it starts with `=`, `+`, `-` or `@` and is not a number), or
    that starts with an apostrophe, gets an apostrophe in front; `from_csv` removes it.
    """
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(map(_cell, row) for row in rows)
    return buffer.getvalue()


def from_csv(cell: str) -> str:
    """Return the text that `csv_text` made this cell from."""
    return cell.removeprefix("'")


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = printable(value, keep="\n")
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text
