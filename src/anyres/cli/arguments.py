"""Build command-line parsers from typed functions: the signature is the interface, the docstring is the help.

argparse splits the command line and `Options` parses the values, so that text means the same here and in a recipe.
Nothing here imports torch, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import ConfigDict, Field, create_model
from pydantic_core import PydanticUndefined

from anyres.errors import UserError
from anyres.options import Options

Command = Callable[..., Any]


@dataclass(frozen=True)
class Group:
    """Commands that share their first word."""

    about: str
    commands: Mapping[str, Command | Group]

    def walk(self, *words: str) -> Iterator[tuple[tuple[str, ...], Command]]:
        """Yield every command of the group and of its subgroups, as (words, command)."""
        for word, entry in self.commands.items():
            if isinstance(entry, Group):
                yield from entry.walk(*words, word)
            else:
                yield (*words, word), entry


class _Parser(argparse.ArgumentParser):
    """Raises UserError for a mistake instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`.")


class _Arguments(Options):
    """Base class of the options in a command's signature."""

    model_config = ConfigDict(validate_default=True)


def parse(
    program: str, description: str, commands: Mapping[str, Command | Group], arguments: Sequence[str]
) -> tuple[Command, dict[str, Any]]:
    """Return the chosen command and its keyword arguments. Raises UserError for a mistake in the arguments.

    A parameter without a default is positional; one of type `list` takes several values; keyword-only parameters are
    options. Options may be written `--batch-size 8`, `--batch_size=8` or `batch_size=8`, and flags `--cost`,
    `--no-cost` or `cost=false`. The word of a group comes before that of its command, as in `segment train`. Types and
    their bounds (`Annotated[int, Field(ge=1)]`) work as in `Options`. A command that takes `**options` has an attribute
    `more_options`, a function that returns a subclass of `Options`; these values are passed on as text.
    """
    words, entry, rest = _choose(program, Group(description, commands), arguments)
    parser = build_parser(" ".join([program, *words]), entry)
    if isinstance(entry, Group):
        if not words:
            parser.add_argument("--version", action="store_true", help="print the version and stop")
        found = vars(parser.parse_args(_normalise(rest, parser, {})))
        if found.get("version"):
            from importlib.metadata import version

            print(f"{program} {version(program)}")
        else:
            parser.print_help()
        raise SystemExit(0)
    more = more_options(entry)
    found = vars(parser.parse_args(_normalise(rest, parser, more.renamed)))
    own = own_options(entry)
    values = dict(own(**{name: value for name, value in found.items() if name in own.model_fields}))
    return entry, {**found, **values}


def _choose(program: str, group: Group, arguments: Sequence[str]) -> tuple[list[str], Command | Group, list[str]]:
    """Return (words of the command, the command or a group if no command is given, the other arguments)."""
    words: list[str] = []
    rest = list(arguments)
    entry: Command | Group = group
    while isinstance(entry, Group):
        word = next((word for word in rest if not word.startswith("-")), None)
        if word is None:
            break
        if word not in entry.commands:
            near = _near(word, list(entry.commands))
            see = " ".join([program, *words])
            raise UserError(f"There is no command {' '.join([*words, word])!r}{near}; see `{see} --help`.")
        rest.remove(word)
        words.append(word)
        entry = entry.commands[word]
    return words, entry, rest


def build_parser(program: str, entry: Command | Group) -> argparse.ArgumentParser:
    """Build the parser of a command, which leaves values as text, or that of a group, which lists its commands."""
    about, _ = _about(entry)
    parser = _Parser(prog=program, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if isinstance(entry, Group):
        places = parser.add_subparsers(metavar="COMMAND")
        for word, inner in entry.commands.items():
            places.add_parser(word, help=_escape(_about(inner)[0].split("\n")[0]))
        return parser
    positional = [
        parameter.name
        for parameter in inspect.signature(entry).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    add_arguments(parser, own_options(entry), positional)
    add_arguments(parser, more_options(entry))
    return parser


def _about(entry: Command | Group) -> tuple[str, dict[str, str]]:
    return (entry.about, {}) if isinstance(entry, Group) else read_docstring(entry)


def own_options(function: Command) -> type[Options]:
    """Return a command's parameters as options, with help texts from its docstring."""
    hints = typing.get_type_hints(function, include_extras=True)
    helps = read_docstring(function)[1]
    fields: dict[str, Any] = {
        name: (
            hints[name],
            Field(... if parameter.default is parameter.empty else parameter.default, description=helps.get(name, "")),
        )
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    return create_model("Arguments", __base__=_Arguments, **fields)


def more_options(function: Command) -> type[Options]:
    """Return the options that a command takes as `**options`."""
    more: type[Options] = getattr(function, "more_options", lambda: Options)()
    return more


def _normalise(arguments: Sequence[str], parser: argparse.ArgumentParser, renamed: Mapping[str, str]) -> list[str]:
    """Rewrite arguments for argparse: `batch_size=8` → `--batch-size=8`, `cost=false` → `--no-cost`.

    Raises UserError for an unknown option and suggests a similar one. A word NAME=VALUE counts as an option if NAME is
    similar to the name of an option and VALUE does not look like a path. The word after `--option` is always its value,
    and nothing after a bare `--` is an option. Options are moved to the front, because argparse requires the values of
    a list to be adjacent.
    """
    options = [word for action in parser._actions for word in action.option_strings if word.startswith("--")]
    old = {f"--{name.replace('_', '-')}": f"--{new.replace('_', '-')}" for name, new in renamed.items()}
    given: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += words
            break
        bare = re.fullmatch(r"([A-Za-z][A-Za-z0-9_-]*)=(.*)", word, flags=re.S)
        if bare:
            name = f"--{bare[1].replace('_', '-')}"
            path = "/" in word or any(map(os.path.exists, (word, bare[2])))
            if name in options or name in old or (not path and _near(name, options, cutoff=0.75)):
                word = f"--{word}"
        if word.startswith("--"):
            name, sign, value = word.partition("=")
            name = name.replace("_", "-")
            if name in old:
                raise UserError(f"Option {name} is now called {old[name]}.")
            if name not in options:
                raise UserError(f"There is no option {name}{_near(name, options)}")
            word = name + sign + value
            if sign and f"--no-{name.removeprefix('--')}" in options:  # argparse does not accept values for flags
                if value.lower() not in ("true", "false"):
                    raise UserError(f"{name} is {value!r}; it must be true or false.")
                word = name if value.lower() == "true" else f"--no-{name.removeprefix('--')}"
            flag = f"--no-{name.removeprefix('--')}" in options or name.startswith("--no-")
            value_follows = not sign and not flag and name not in ("--help", "--version")
            word = "=".join([word, *islice(words, value_follows)])
            if word.partition("=")[2] == "--":  # argparse before Python 3.13 drops it
                raise UserError(f"{name} is '--', which separates options from files; give it a value.")
            given.append(word)
        elif word.startswith("-") and word != "-h":
            raise UserError(f"There is no option {word}; write a file name that begins with - as ./{word}.")
        else:
            (given if word == "-h" else rest).append(word)
    return [*given, *(["--"] if rest else []), *rest]


def _near(word: str, known: list[str], cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def read_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Split a Google-style docstring into (text before "Args:", help by parameter)."""
    text = inspect.getdoc(function) or ""
    about, _, args = text.partition("\nArgs:\n")
    helps: dict[str, str] = {}
    name = ""
    for line in args.splitlines():
        entry = re.match(r"    (\w+): (.*)", line)
        if entry:
            name = entry[1]
            helps[name] = entry[2]
        elif name and line.strip():
            helps[name] += " " + line.strip()
    return about.strip(), helps


def add_arguments(parser: argparse.ArgumentParser, options: type[Options], positional: Collection[str] = ()) -> None:
    """Add an argument for every option. Values are left as text; options not given are absent from the result."""
    for name, field in options.model_fields.items():
        hint = _without_none(field.annotation)
        settings: dict[str, Any] = {"help": _escape(f"{field.description}{_shown(field.default)}")}
        if name in positional:
            settings["nargs"] = "+" if get_origin(hint) is list else None if field.is_required() else "?"
            settings["metavar"] = name.upper()
        elif hint is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif get_origin(hint) is Literal:
            settings["metavar"] = f"{{{','.join(map(str, get_args(hint)))}}}"
        else:
            settings["metavar"] = name.upper().split("_")[-1]
        flag = name if name in positional else f"--{name.replace('_', '-')}"
        parser.add_argument(flag, default=argparse.SUPPRESS, **settings)


def _shown(default: Any) -> str:
    """Format a default for a help text; return "" if the default is off or empty."""
    if default is True:
        return " (default true)"
    if isinstance(default, list | tuple):
        default = ",".join(map(str, default))
    return "" if default in (None, False, "", {}, PydanticUndefined) else f" (default {default})"


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        return next(choice for choice in get_args(hint) if choice is not NoneType)
    return hint
