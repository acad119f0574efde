"""Names of parameters: rules from published ones to ours, and the layouts of other libraries."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class KeyRule(NamedTuple):
    """One difference between published parameter names and ours.

    `published` and `ours` are complete dot-separated parts, matched anywhere in the name, or only at its start after a
    "^". "{i}" and "{j}" match numbers, and "{i+1}" the number plus one: `KeyRule("^block{i+1}.{j}",
    "^stages.{i}.blocks.{j}")`. `unit_axes` names axes of length 1 that only the published tensor has: "conv" for the
    last two (a 1x1 convolution that is a linear layer here), "norm" for those of (1, C, 1, 1).
    """

    published: str
    ours: str
    unit_axes: Literal["", "conv", "norm"] = ""


@cache
def _key_pattern(template: str) -> re.Pattern[str]:
    start = "^" if template.startswith("^") else r"(?:^|(?<=\.))"
    parts = re.split(r"(\{\w(?:[+-]\d+)?\})", template.removeprefix("^"))
    pattern = "".join(rf"(?P<{part[1]}>\d+)" if part.startswith("{") else re.escape(part) for part in parts)
    return re.compile(rf"{start}{pattern}(?=\.|$)")


def _key_offsets(template: str) -> dict[str, int]:
    return {name: int(offset or 0) for name, offset in re.findall(r"\{(\w)([+-]\d+)?\}", template)}


def rename(name: str, tensor: Tensor, rules: Sequence[KeyRule], back: bool = False) -> tuple[str, Tensor]:
    """Apply `rules` to a parameter's name and shape, from published to ours, or the other way with `back`."""
    for rule in reversed(rules) if back else rules:
        source, target = (rule.ours, rule.published) if back else (rule.published, rule.ours)
        if (match := _key_pattern(source).search(name)) is None:
            continue
        have, want = _key_offsets(source), _key_offsets(target)
        replacement = target.removeprefix("^")
        for key, value in match.groupdict().items():
            number = int(value) - have[key] + want[key]
            replacement = re.sub(rf"\{{{key}(?:[+-]\d+)?\}}", str(number), replacement)
        name = name[: match.start()] + replacement + name[match.end() :]
        if rule.unit_axes == "conv" and tensor.ndim > 1:
            tensor = tensor[..., None, None] if back else tensor.flatten(1)
        elif rule.unit_axes == "norm" and name.endswith(("weight", "bias")):
            tensor = tensor.view(1, -1, 1, 1) if back else tensor.flatten()
    return name, tensor


class Layout(NamedTuple):
    """The names that another library gives to a system's parameters, and the order that it keeps them in.

    `mark` is part of a name that tells its files from published ones. `keys` are rules, in order, to names that
    `Backbone.from_published` knows; `prefix` is removed first. A layer that the library keeps in parts gets names such
    as "attn.qkv+0", "attn.qkv+1", …, and the parts are joined. `convert` does what renaming cannot.
    """

    library: str
    mark: str
    keys: tuple[KeyRule, ...]
    prefix: tuple[str, ...] = ()
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether the names may be those of this layout."""
        return any(self.mark in name for name in state)

    def to_published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state under names that `Backbone.from_published` knows; a name that has none is unchanged."""
        found: dict[str, Tensor] = {}
        for name, tensor in state.items():
            prefix = next((prefix for prefix in self.prefix if name.startswith(prefix)), "")
            known, _ = rename(name.removeprefix(prefix), tensor, self.keys)
            found[name if known in found else known] = tensor
        found = _join_parts(found)
        return self.convert(found) if self.convert else found


def _join_parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate the tensors NAME+0.KIND, NAME+1.KIND, … to NAME.KIND."""
    joined: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, plus, rest = name.partition("+")
        if not plus:
            joined[name] = tensor
        elif rest.startswith("0."):
            kind = rest.removeprefix("0")
            parts = [tensor]
            while (part := state.get(f"{layer}+{len(parts)}{kind}")) is not None:
                parts.append(part)
            kinds = {(part.ndim, part.shape[1:], part.dtype) for part in parts}
            joined[f"{layer}{kind}"] = torch.cat(parts) if tensor.ndim and len(kinds) == 1 else tensor
    return joined


TRANSFORMERS_BLOCK = (
    *(
        KeyRule(f"attention.{place}", f"attn.qkv+{i}")
        for i, name in enumerate(("query", "key", "value"))
        for place in (f"{name[0]}_proj", f"self.{name}", f"attention.{name}")
    ),
    KeyRule("attention.o_proj", "attn.proj"),
    KeyRule("attention.output.dense", "attn.proj"),
    KeyRule("intermediate.dense", "mlp.fc1"),
    KeyRule("output.dense", "mlp.fc2"),
    KeyRule("layernorm_before", "norm1"),
    KeyRule("layernorm_after", "norm2"),
    KeyRule("^layernorm", "norm"),
    KeyRule("^classifier", "head"),
)
"""Names of a transformer block in transformers, before version 5 and since."""


# Recognising ----------------------------------------------------------------------------------------------------------

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Parts of names that torch.compile, FSDP, gradient checkpointing and Fabric add anywhere."""
_PREFIXES = ("module.", "backbone.", "bottom_up.", "model.", "encoder.", "net.")


class Recognised(NamedTuple):
    """A state dict under our names; `library` is where its names came from, empty for published ones and ours."""

    state: dict[str, Tensor]
    library: str


def readings(
    state: dict[str, Tensor],
    from_published: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    layouts: Sequence[Layout],
    part: bool = False,
) -> list[Recognised]:
    """Return a state dict under our names, in every way in which its names can be read.

    Names of wrappers and prefixes such as "module." or "backbone." are removed. With `part`, the file may be of a
    larger network, whose other parts lack the prefix and are left out.
    """
    plain = {_without_wrappers(name): tensor for name, tensor in state.items()}
    found = []
    for stripped in _without_prefixes(plain, part):
        found.append(Recognised(from_published(stripped), ""))
        for layout in layouts:
            if layout.matches(stripped):
                found.append(Recognised(from_published(layout.to_published(stripped)), layout.library))
    return found


def best(found: Sequence[Recognised], own: Mapping[str, Tensor], part: bool = False) -> Recognised:
    """Return the reading that has most of a model's parameters, in name and shape, or else in name."""

    def score(reading: Recognised) -> tuple[int, int, int]:
        shared = reading.state.keys() & own.keys()
        alike = sum(reading.state[name].shape == own[name].shape for name in shared)
        return alike, len(shared), -len(reading.state) if part else 0

    return max(found, key=score)


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _without_prefixes(state: dict[str, Tensor], part: bool) -> list[dict[str, Tensor]]:
    """Return the state itself, then versions with known prefixes removed, up to three levels deep.

    With `part`, only the entries that have the prefix are kept.
    """
    found = [state]
    frontier = [state]
    for _ in range(3):
        frontier = [
            {
                name.removeprefix(prefix): tensor
                for name, tensor in candidate.items()
                if not part or name.startswith(prefix)
            }
            for candidate in frontier
            for prefix in _PREFIXES
            if any(name.startswith(prefix) for name in candidate)
        ]
        found += frontier
    return found
