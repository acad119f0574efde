"""Safe parsing of JSON and YAML from users: bounded size and depth, and no ambiguous values."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from anyres.errors import UserError

MAX_JSON = 16 << 20
MAX_YAML = 256 << 10
MAX_TEXT = 256 << 20
"""Enough for a list of a few million files."""
MAX_DEPTH = 20
"""Maximum nesting of lists and mappings in YAML."""


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises UserError if it is not JSON, is nested too deeply, is larger than 16 MiB, has a duplicate key, or contains a
    number that is not finite.
    """
    text = read_text(path, MAX_JSON)
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON that can be read ({error}): restore it from a copy.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice[:80]!r} twice")
    return found


def _not_finite(word: str) -> Any:
    raise ValueError(f"{word} is not a number")


def read_yaml(path: Path) -> Any:
    """Read a YAML file (see `parse_yaml`). Raises FileNotFoundError, and UserError with the path and line."""
    return parse_yaml(read_text(path, MAX_YAML), str(path))


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML made of plain values, lists and mappings with string keys.

    Aliases and tags of YAML 1.1 are rejected, and strings are not unexpectedly read as numbers or dates: 1:30 is not
    90, and 012 is not 10. Raises UserError, which calls the text `name`, for these, for duplicate keys, and for invalid
    YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
        raise UserError(f"{name} cannot be read as YAML ({reason}{place})") from error


def read_mapping(value: Any) -> Any:
    """Parse a string like `embed_dim=96,depth=4`, or a YAML mapping, to a dictionary. Other values are returned
    unchanged.

    Raises UserError, without a name for the text, for any other string.
    """
    if not isinstance(value, str):
        return value
    pair = r"(^|,)\s*(\w+)\s*="
    pairs = re.sub(pair, r"\1 \2: ", value)
    fix = f"{value!r:.80}; write it as embed_dim=96,depth=4"
    try:
        found = parse_yaml(f"{{{pairs}}}" if re.match(pair, value) else value, "it")
    except UserError as error:
        raise UserError(f"{fix}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(fix)
    return found


class _Loader(yaml.SafeLoader):
    """A YAML loader without surprises: values are resolved only by the patterns below."""

    depth = 0
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (of the class, as PyYAML wants it)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self.complain(f"the alias *{event.anchor} is not followed: write its value out", event)
        if getattr(event, "tag", None) not in (None, "!"):
            self.complain(f"the tag {event.tag} is not known here: write a plain value", event)
        if self.depth == MAX_DEPTH:
            self.complain("it is nested too deeply", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        found: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                self.complain(f"the name {key_node.value!r:.80} is no text: write it in quotes", key_node)
            if key in found:
                self.complain(f"it has {key!r:.80} twice: leave one out", key_node)
            found[key] = self.construct_object(value_node, deep=deep)
        return found

    def complain(self, problem: str, place: Any) -> None:
        raise yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


def _resolve(tag: str, pattern: str, first: str | None) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), first and list(first))


_resolve("null", r"~|null|Null|NULL|", None)
_resolve("bool", r"(?i:true|false|yes|no|on|off)", "tTfFyYnNoO")
_resolve("int", r"[-+]?(0|[1-9][0-9_]{0,30})", "-+0123456789")
_resolve("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+0123456789.")
_resolve("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.")


def read_text(path: Path, most: int = MAX_TEXT) -> str:
    """Read a UTF-8 text file from a user, without its byte order mark.

    Raises FileNotFoundError, and UserError for anything but a regular file (reading a pipe would block), for more than
    `most` bytes, and for text that is not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no regular file: give one.")
    if status.st_size > most:
        raise UserError(f"{path} has more than {most >> 10} KiB, which no such file needs: give the right one.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text in UTF-8 (at byte {error.start}): save it as one.") from error
