"""Typed functions to command-line parsers: the signature is the interface, the docstring is the help.

Built on argparse alone, so that `--help` answers before torch is loaded.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Literal, NoReturn, get_args, get_origin

from anyres.errors import UserError

Command = Callable[..., Any]


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`.")


def parse(
    program: str, description: str, commands: dict[str, Command], arguments: Sequence[str]
) -> tuple[Command, dict[str, Any]]:
    """The chosen command and its keyword arguments.

    A parameter without a default is positional; a `list` one takes several values; keyword-only ones are options.
    Options may be written `--batch-size 8`, `--batch_size=8` or `batch_size=8`, flags `--cost`, `--no-cost` or
    `cost=false`. A command may have two words, such as
    `segment train`. Errors: UserError with one sentence.
    """
    arguments = _join_words(arguments, list(commands))
    parser = _Parser(prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, function in commands.items():
        about, helps = read_docstring(function)
        sub = subparsers.add_parser(
            name, help=about.split("\n")[0], description=about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add_parameters(sub, function, helps)
    options = {name: _option_names(subparsers.choices[name]) for name in commands}
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command is not None and command not in commands:
        raise UserError(f"There is no command {command!r}{_near(command, list(commands))}; see `{program} --help`.")
    values = vars(parser.parse_args(_normalise(arguments, options.get(command or "", []))))
    if values.pop("version"):
        from importlib.metadata import version

        print(f"{program} {version(program)}")
        raise SystemExit(0)
    chosen = values.pop("command")
    if chosen is None:
        parser.print_help()
        raise SystemExit(0)
    return commands[chosen], values


def _join_words(arguments: Sequence[str], commands: list[str]) -> list[str]:
    """The words of a command of two words as one argument; a first word alone lists what may follow it."""
    words = [word for word in arguments if not word.startswith("-")]
    group = [command for command in commands if words and command.startswith(f"{words[0]} ")]
    if not group:
        return list(arguments)
    name = " ".join(words[:2])
    if name not in group:
        known = ", ".join(group)
        if len(words) < 2:
            raise UserError(f"{words[0]} is not a whole command; there are {known}.")
        raise UserError(f"There is no command {name!r}{_near(name, group)}; there are {known}.")
    rest = list(arguments)
    rest.remove(words[0])
    rest.remove(words[1])
    return [name, *rest]


def _option_names(parser: argparse.ArgumentParser) -> list[str]:
    return [word for action in parser._actions for word in action.option_strings if word.startswith("--")]


def _normalise(arguments: Sequence[str], options: list[str]) -> list[str]:
    """`batch_size=8` and `--batch_size 8` → `--batch-size=8`, `--batch-size 8`; `cost=false` → `--no-cost`; an unknown
    option is an error with a near miss. So is a word NAME=VALUE whose NAME is close to an option's, unless VALUE looks
    like a path. What follows `--option` is its value, whatever it looks like; nothing behind a bare `--` is an option.
    The command comes first, its options next, the rest last: argparse wants the files of a list side by side."""
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
            if name in options or (not path and _near(name, options, cutoff=0.75)):
                word = f"--{word}"
        if word.startswith("--"):
            name, sign, value = word.partition("=")
            name = name.replace("_", "-")
            if options and name not in options:
                raise UserError(f"There is no option {name}{_near(name, options)}")
            word = name + sign + value
            if sign and f"--no-{name.removeprefix('--')}" in options:  # argparse's flags take no value
                if value.lower() not in ("true", "false"):
                    raise UserError(f"{name} is {value!r}; it must be true or false.")
                word = name if value.lower() == "true" else f"--no-{name.removeprefix('--')}"
            flag = f"--no-{name.removeprefix('--')}" in options or name.startswith("--no-")
            value_follows = not sign and not flag and name not in ("--help", "--version")
            word = "=".join([word, *islice(words, value_follows)])
            if word.partition("=")[2] == "--":  # argparse before Python 3.13 drops it
                raise UserError(f"{name} is '--', which stands between options and files; give it a value.")
            given.append(word)
        elif word.startswith("-") and word != "-h":
            raise UserError(f"There is no option {word}; write a file's name that begins with - as ./{word}.")
        else:
            (given if word == "-h" else rest).append(word)
    return [*rest[:1], *given, *(["--"] if rest[1:] else []), *rest[1:]]


def _near(word: str, known: list[str], cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def read_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """(text before "Args:", help by parameter) of a Google-style docstring."""
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


def add_parameters(parser: argparse.ArgumentParser, function: Callable[..., Any], helps: dict[str, str]) -> None:
    """One argument per parameter. A function that takes `**options` lists them in its attribute `more_options`, which
    returns (type, default, help) by name."""
    hints = typing.get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        name, text = parameter.name, helps.get(parameter.name, "")
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            add_positional(parser, name, hints[name], parameter.default, text)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            add_option(parser, name, hints[name], parameter.default, text)
    for name, (hint, default, text) in getattr(function, "more_options", dict)().items():
        add_option(parser, name, hint, default, text, given_only=True)


def add_positional(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any, text: str) -> None:
    """Add a positional argument; one with a default may be left out."""
    optional = default is not inspect.Parameter.empty
    number = "+" if get_origin(hint) is list else "?" if optional else None
    extra: dict[str, Any] = {"default": argparse.SUPPRESS} if optional else {}
    parser.add_argument(name, metavar=name.upper(), nargs=number, type=_reader(hint), help=_escape(text), **extra)


def add_option(
    parser: argparse.ArgumentParser, name: str, hint: Any, default: Any, text: str, given_only: bool = False
) -> None:
    """Add an option. `given_only`: absent from the result unless the user gave it, as text for the receiver to read."""
    hint = _without_none(hint)
    if not given_only and default not in (None, "", False) and not isinstance(default, bool):
        text += f" (default {default})"
    settings: dict[str, Any] = {"help": _escape(text), "default": argparse.SUPPRESS if given_only else default}
    flag = f"--{name.replace('_', '-')}"
    if hint is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
    elif get_origin(hint) is Literal:
        parser.add_argument(flag, choices=get_args(hint), **settings)
    else:
        reader = str if given_only else _reader(hint)
        parser.add_argument(flag, metavar=name.upper().split("_")[-1], type=reader, **settings)


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def _without_none(hint: Any) -> Any:
    if get_origin(hint) is types.UnionType:
        return next(choice for choice in get_args(hint) if choice is not types.NoneType)
    return hint


def _reader(hint: Any) -> Callable[[str], Any]:
    hint = _without_none(hint)
    if get_origin(hint) is list:
        hint = get_args(hint)[0]
    words = {int: "a whole number", float: "a number"}

    def read(text: str) -> Any:
        try:
            return hint(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {words.get(hint, hint.__name__)}") from None

    return read
