"""Detecting hooks on modules."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def is_watched(*modules: nn.Module) -> bool:
    """Return whether a hook observes the inputs or outputs of these modules or their submodules."""
    return bool(torch_module._has_any_global_hook()) or any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for module in modules
        for part in module.modules()
    )
