"""The commands: typed functions whose signature is the interface and whose docstring is the help.

Heavy packages are imported only when a command runs, so that `anyres --help` is fast.
"""

from __future__ import annotations

from anyres.cli.arguments import Command, Group
from anyres.cli.commands.convert import convert
from anyres.cli.commands.demo import demo_command
from anyres.cli.commands.info import info
from anyres.cli.commands.models import models
from anyres.cli.commands.predict import predict
from anyres.cli.commands.sweep import sweep
from anyres.cli.commands.test import test_command
from anyres.cli.commands.train import train_command
from anyres.tasks import TASKS
from anyres.tasks.base import Task


def _commands_of(task: Task) -> dict[str, Command | Group]:
    own: dict[str, Command | Group] = {
        "demo": demo_command(task),
        "train": train_command(task),
        "test": test_command(task),
    }
    return {task.group: Group(f"Demo, training and testing for {task.name}.", own)} if task.group else own


COMMANDS: dict[str, Command | Group] = {
    **{word: entry for task in TASKS.values() for word, entry in _commands_of(task).items()},
    "sweep": sweep,
    "predict": predict,
    "models": models,
    "info": info,
    "convert": convert,
}
