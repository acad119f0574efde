"""Ways to watch a network: hooks that keep what submodules return, and layers that show their weights to nobody."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


class Records:
    """What every submodule returned: the tensors themselves, copies made at once, and their versions."""

    def __init__(self, model: nn.Module) -> None:
        self.kept: dict[str, list[Tensor]] = {}
        self.copies: dict[str, list[Tensor]] = {}
        self.versions: list[tuple[str, Tensor, int]] = []
        self.handles = [
            module.register_forward_hook(lambda _, __, out, name=name: self.record(name, out))
            for name, module in model.named_modules()
        ]

    def record(self, name: str, out: Any) -> None:
        for tensor in (leaf for leaf in tree_leaves(out) if torch.is_tensor(leaf)):
            self.kept.setdefault(name, []).append(tensor)
            self.copies.setdefault(name, []).append(tensor.detach().clone())
            if not tensor.is_inference():
                self.versions.append((name, tensor, tensor._version))

    def check_untouched(self) -> None:
        for name, tensor, version in self.versions:
            assert tensor._version == version, f"what {name} returned was written to"
        for name, tensors in self.kept.items():
            for tensor, copy in zip(tensors, self.copies[name], strict=True):
                assert torch.equal(tensor, copy), f"what {name} returned was written to"

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def seal(model: nn.Module) -> dict[str, int]:
    """Make every linear layer and convolution refuse to show its parameters to anybody but itself, and count its
    calls."""
    calls: dict[str, int] = {}

    def sealed(kind: type[nn.Module], name: str) -> type[nn.Module]:
        def own(key: str) -> property:
            def read(self: Any) -> Any:
                assert self.open, f"{name}.{key} is read from outside"
                return self._parameters[key]

            return property(read)

        def forward(self: Any, *args: Any) -> Any:
            calls[name] += 1
            self.open = True
            try:
                return kind.forward(self, *args)
            finally:
                self.open = False

        return type(kind.__name__, (kind,), {"forward": forward, "weight": own("weight"), "bias": own("bias")})

    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            calls[name] = 0
            module.__class__ = sealed(type(module), name)  # type: ignore[assignment]  # the same class, watched
    return calls
