"""Load the options of a run from a recipe file or from the config.yaml of an earlier run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyres.errors import UserError
from anyres.io.parsing import read_mapping, read_yaml
from anyres.options import did_you_mean
from anyres.training.config import CONFIG_FILE, config_of

RECIPES = Path(__file__).parent / "recipes"
ARGUMENTS = {"model_args": "model", "head_args": "head"}
"""Option with the arguments of an architecture → option that names it."""


def field_help(task: str = "classification") -> dict[str, str]:
    """Return the help text of each option of a task, by name."""
    return {name: str(field.description) for name, field in config_of(task).model_fields.items()}


def list_recipes(task: str = "classification") -> list[str]:
    """Return the names of the recipes for a task that come with the package, sorted."""
    return sorted(path.stem for path in (RECIPES / task).glob("*.yaml"))


def read_recipe(name: str | Path, task: str = "classification") -> dict[str, Any]:
    """Read the options of a recipe, given by its name or by the path of a YAML file such as a run's config.yaml.

    Raises:
        UserError: if the recipe does not exist, is not a YAML mapping, has an unknown option or is for another task.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / task / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"recipe {str(name)!r} does not exist{did_you_mean(str(name), list_recipes(task))}")
    try:
        options = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"recipe file {path} does not exist") from None
    if not isinstance(options, dict):
        raise UserError(f"{path} must contain options as `name: value` lines")
    found = options.pop("task", task)
    if found != task:
        raise UserError(f"{path} is a recipe for {found}, not for {task}; use the command for its task")
    if path.name == CONFIG_FILE:  # written by a run, perhaps by an earlier version
        options = config_of(task).translated(options)
    check_names(options, task, where=str(path))
    return options


def load_config(
    recipe: str | Path | Mapping[str, Any] | None = None, task: str = "classification", **overrides: Any
) -> Any:
    """Return an instance of `config_of(task)` with the options of a recipe (name, path or mapping) and `overrides`.

    Overriding `model_args` or `head_args` changes the given arguments and keeps the recipe's others. The recipe's
    arguments are for its own architecture: with a model of another system, or another head, they do not apply.

    Raises UserError for an unknown recipe or option and for a value that is not allowed.
    """
    options = dict(recipe) if isinstance(recipe, Mapping) else read_recipe(recipe, task) if recipe is not None else {}
    for name, owner in ARGUMENTS.items():
        if name in options and owner in overrides and not _akin(options.get(owner), overrides[owner]):
            del options[name]
        if name in options and name in overrides:
            overrides[name] = _merged(options[name], overrides[name])
    options.update(overrides)
    check_names(options, task)
    return config_of(task)(**options)


def _akin(first: Any, second: Any) -> bool:
    """Return whether two architectures are the same or variants of one system, which take the same arguments."""
    from anyres.models._registry import entries, resolve_name

    if first == second:
        return True
    try:
        return entries()[resolve_name(str(first))].family is entries()[resolve_name(str(second))].family
    except UserError:
        return False


def _merged(recipe: Any, given: Any) -> Any:
    try:
        recipe, given = read_mapping(recipe), read_mapping(given)
    except UserError:
        return given  # validating the options reports it with its name
    return {**recipe, **given} if isinstance(recipe, Mapping) and isinstance(given, Mapping) else given


def check_names(options: Mapping[str, Any], task: str = "classification", where: str = "") -> None:
    """Raise UserError for the first option that does not exist; the message suggests its new or the closest name."""
    for name in options:
        try:
            config_of(task).check_name(str(name))
        except UserError as error:
            raise UserError(f"{where}: {error}" if where else str(error)) from None
