"""Recipe files, and a run's own config.yaml, to the options of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyres.errors import UserError
from anyres.io.parsing import read_yaml
from anyres.options import did_you_mean
from anyres.training.config import CONFIG_FILE, config_of

RECIPES = Path(__file__).parent / "recipes"


def field_help(task: str = "classification") -> dict[str, str]:
    """Help text by option name."""
    return {name: str(field.description) for name, field in config_of(task).model_fields.items()}


def list_recipes(task: str = "classification") -> list[str]:
    """Names of the recipes for a task that come with the package."""
    return sorted(path.stem for path in (RECIPES / task).glob("*.yaml"))


def read_recipe(name: str | Path, task: str = "classification") -> dict[str, Any]:
    """Options of a recipe, by its name or by the path of a YAML file (such as a run's config.yaml).

    Raises:
        UserError: no such recipe, a file that is not a YAML mapping, an unknown option, or a recipe of another task.
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
        raise UserError(f"{path} must hold options as `name: value` lines")
    found = options.pop("task", task)
    if found != task:
        raise UserError(f"{path} is a recipe for {found}, not for {task}; choose the command of its task")
    if path.name == CONFIG_FILE:  # a run's own, maybe an earlier version's
        options = config_of(task).translated(options)
    check_names(options, task, where=str(path))
    return options


def load_config(
    recipe: str | Path | Mapping[str, Any] | None = None, task: str = "classification", **overrides: Any
) -> Any:
    """The options of a recipe (name, path or mapping), changed by `overrides`: those of `config_of(task)`."""
    options = dict(recipe) if isinstance(recipe, Mapping) else read_recipe(recipe, task) if recipe is not None else {}
    options.update(overrides)
    check_names(options, task)
    return config_of(task)(**options)


def check_names(options: Mapping[str, Any], task: str = "classification", where: str = "") -> None:
    """Raise `UserError` for the first option that does not exist, with its new name or the nearest one."""
    for name in options:
        try:
            config_of(task).check_name(str(name))
        except UserError as error:
            raise UserError(f"{where}: {error}" if where else str(error)) from None
