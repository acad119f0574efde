"""The pages that are made from the code say what the code says, and the commands in all of them can be typed."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
from pathlib import Path

import pytest

import anyres
from anyres.cli.arguments import Group, parse
from anyres.cli.commands import COMMANDS
from anyres.models._registry import resolve_name
from anyres.training import load_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RECIPES = Path(anyres.__file__).parent / "training" / "recipes"
TASKS = {
    "train": "classification",
    "segment train": "segmentation",
    "detect train": "detection",
    "video train": "video",
}


def commands() -> list[str]:
    """The commands in blocks of code and at the top of recipes, from `anyres` on, without remarks."""
    pages = [*ROOT.glob("*.md"), *DOCS.glob("*.md")]
    blocks = "\n".join(
        block for page in pages for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.S | re.M)
    )
    recipes = "\n".join(path.read_text() for path in RECIPES.rglob("*.yaml"))
    found = re.findall(r"^(?:torchrun .*|uv run )?(anyres .*)", blocks, re.M)
    found += re.findall(r"^# Command: .*?(anyres .*)", recipes, re.M)
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_commands_in_the_pages_can_be_typed(command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    function, values = parse("anyres", "", COMMANDS, words)
    name = next(" ".join(path) for path, known in Group("", COMMANDS).walk() if known is function)
    if name in TASKS:
        values = {option: value for option, value in values.items() if value is not None}
        assert resolve_name(load_config(values.pop("recipe", None), TASKS[name], **values).model)


HOME = r"https://(?:github\.com/anyres/anyres/blob|raw\.githubusercontent\.com/anyres/anyres)/main/"


def test_links_of_the_readme_are_whole_and_lead_somewhere() -> None:
    """The package's page shows the README alone: a path in the repository would lead nowhere."""
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())
    assert all(link.startswith("https://") for link in links)
    own = [re.sub(HOME, "", link).partition("#")[0] for link in links if re.match(HOME, link)]
    assert "docs/demo.png" in own
    assert all((ROOT / path).is_file() for path in own), own


def test_long_files_say_why() -> None:
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text()
        if text.count("\n") > 400:
            assert "though long" in (ast.get_docstring(ast.parse(text)) or ""), path


@pytest.mark.skipif(not DOCS.is_dir(), reason="the pages stand in the repository only")
def test_the_page_of_models_is_up_to_date() -> None:
    page = runpy.run_path(str(DOCS / "make_models.py"))["text"]()
    assert page == (DOCS / "models.md").read_text(), "run docs/make_models.py"
