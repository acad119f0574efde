"""The commands: typed functions whose signature is the interface and whose docstring is the help.

Nothing heavy is imported before a command runs, so that `anyres --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable

from anyres.cli.commands.convert import convert
from anyres.cli.commands.demo import demo_command
from anyres.cli.commands.info import info
from anyres.cli.commands.models import models
from anyres.cli.commands.predict import predict
from anyres.cli.commands.sweep import sweep
from anyres.cli.commands.test import test_command
from anyres.cli.commands.train import train_command
from anyres.tasks import TASKS

COMMANDS: dict[str, Callable[..., None]] = {
    **{
        f"{task.group} {name}".strip(): command(task)
        for task in TASKS.values()
        for name, command in (("demo", demo_command), ("train", train_command), ("test", test_command))
    },
    "sweep": sweep,
    "predict": predict,
    "models": models,
    "info": info,
    "convert": convert,
}
