"""What the suites need to know of each system: one file each, named like its model file.

`SMALL`: constructor arguments (by model name pattern, first match counts) that make its models quick, everything else
as published. `options(about, record)`: the options of `create_model` with which a recorded case was made, besides its
variant. `UNREAD_MAPS`: modules of `feature_info` that no logit depends on. `OUTPUTS`: how to get recorded outputs that
are not common to all.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from anyres.models._registry import entries


def system(name: str) -> ModuleType:
    """The file of a registered model's system."""
    return importlib.import_module(f"{__name__}.{entries()[name].family.model.__module__.rpartition('.')[2]}")
