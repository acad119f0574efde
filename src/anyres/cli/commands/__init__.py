"""The commands: typed functions whose signature is the interface and whose docstring is the help.

Nothing heavy is imported before a command runs, so that `anyres --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable

from anyres.cli.commands.convert import convert
from anyres.cli.commands.demo import demo, detect_demo, segment_demo, video_demo
from anyres.cli.commands.info import info
from anyres.cli.commands.models import models
from anyres.cli.commands.predict import predict
from anyres.cli.commands.sweep import sweep
from anyres.cli.commands.test import detect_test, segment_test, video_test
from anyres.cli.commands.train import detect_train, segment_train, train, video_train

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "segment demo": segment_demo,
    "segment train": segment_train,
    "segment test": segment_test,
    "detect demo": detect_demo,
    "detect train": detect_train,
    "detect test": detect_test,
    "video demo": video_demo,
    "video train": video_train,
    "video test": video_test,
    "sweep": sweep,
    "predict": predict,
    "models": models,
    "info": info,
    "convert": convert,
}
