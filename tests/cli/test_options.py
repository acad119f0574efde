"""What can be typed: every option of every command, as `options.txt` beside this file has them."""

from __future__ import annotations

import difflib
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from anyres.cli.arguments import Group, build_parser, more_options, own_options, parse
from anyres.cli.commands import COMMANDS
from anyres.cli.main import main
from anyres.errors import UserError
from anyres.options import Options, bounds_words, option, type_words

FROZEN = Path(__file__).with_name("options.txt")


def lines() -> list[str]:
    """For each command its arguments in the order of its help: spelling, type, bounds and default."""
    found = []
    for words, command in Group("", COMMANDS).walk():
        found.append(" ".join(["anyres", *words]))
        own, more = own_options(command).model_fields, more_options(command).model_fields
        for action in build_parser("anyres", command)._actions:
            if action.dest != "help":
                field = more[action.dest] if action.option_strings and action.dest in more else own[action.dest]
                spelling = " ".join(action.option_strings) or action.dest.upper()
                default = "" if field.is_required() else f"; {field.default!r}"
                bounds = bounds_words(field)
                found.append(f"  {spelling}: {type_words(field.annotation)}{bounds and '; '}{bounds}{default}")
    return found


def test_no_option_changes_unnoticed() -> None:
    """Whoever renames or removes an option breaks scripts and recipes of others: the old name goes into `renamed` of
    its `Options`. After a change on purpose: `uv run python -m tests.cli.test_options`, and say so in the commit."""
    changes = difflib.unified_diff(FROZEN.read_text(encoding="utf-8").splitlines(), lines(), "frozen", "now", n=0)
    assert not list(changes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["segment ", "predict "]),
        (["--help"], ["Demo, training and testing for segmentation.", "convert "]),
        (["segment"], ["usage: anyres segment", "train "]),
        (["segment", "--help"], ["usage: anyres segment", "train ", "test "]),
        (["segment", "train", "-h"], ["usage: anyres segment train", "--head", "{upernet,"]),
        (["sweep", "x", "--help"], ["MODELS", "(default 96:640:32)", "(default true)"]),
    ],
)
def test_help_lists_what_there_is(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("anyres", "About.", COMMANDS, arguments)
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(word in shown for word in words), shown


def test_help_comes_without_torch() -> None:
    code = "import sys; from anyres.cli.main import main; main(sys.argv[1:])"
    for words in (["--help"], ["segment", "train", "--help"], ["sweep", "--help"]):
        watch = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
        done = subprocess.run([sys.executable, "-c", watch, *words], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["segment", "trian"], "There is no command 'segment trian'; did you mean train?; see `anyres segment --help`"),
        (["segment", "--batch-size=3"], "There is no option --batch-size"),
        (["--sizes", "3"], "There is no command '3'"),
        (["predict", "x"], "FILES; see `anyres predict --help`"),
        (["predict", "x", "y", "topk=0"], "topk is 0; it must be at least 1"),
        (["predict", "x", "y", "threshold=1.5"], "threshold is 1.5; it must be between 0 and 1"),
        (["predict", "x", "y", "--layout", "tabel"], "layout is 'tabel'; it must be one of table, csv"),
        (["segment", "test", "x", "scales=1,inf"], "scales holds 'inf'; it must be a list of values, each a number"),
        (["video", "test", "x", "batch_size=1.5"], "batch_size is '1.5'; it must be a whole number"),
        (["train", "precision=bf16"], "precision is 'bf16', which is now spelled 'bfloat16'"),
        (["train", "model_args=depth"], "model_args is 'depth'; write it as embed_dim=96,depth=4"),
        (["train", "model_args=a: ["], "write it as embed_dim=96,depth=4: it cannot be read as YAML"),
    ],
)
def test_mistakes_get_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert sentence in said[0]
    assert not list(tmp_path.iterdir())


def test_an_option_that_was_renamed_names_the_new_one() -> None:
    class More(Options):
        renamed: ClassVar = {"all_sides": "sizes"}
        sizes: int = option(1, "Sizes.")

    def command(**options: Any) -> None:
        """About."""

    command.more_options = lambda: More  # type: ignore[attr-defined]
    for word in ("--all-sides=3", "all_sides=3", "--all_sides"):
        with pytest.raises(UserError, match="Option --all-sides is now called --sizes"):
            parse("anyres", "", {"do": command}, ["do", word])
    assert parse("anyres", "", {"do": command}, ["do", "sizes=3"])[1] == {"sizes": "3"}


def test_values_arrive_as_the_types_of_the_signature() -> None:
    given = parse("anyres", "", COMMANDS, ["segment", "test", "x", "scales=0.5,1", "--size", "64", "device=cpu"])[1]
    assert (given["size"], given["device"], given["names"]) == (64, "cpu", None)
    assert given["scales"] == "0.5,1"  # the task's own, which reads it
    assert parse("anyres", "", COMMANDS, ["sweep", "a,b", "c"])[1]["models"] == ["a,b", "c"]


if __name__ == "__main__":
    FROZEN.write_text("\n".join(lines()) + "\n", encoding="utf-8")
