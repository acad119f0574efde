"""Check weights and outputs for NaN and infinity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from anyres.errors import UserError


def model_name(model: nn.Module | str) -> str:
    """Return the architecture of a model or of its backbone, or the name of its class if there is none."""
    if isinstance(model, str):
        return model.removeprefix("anyres_")
    backbone = getattr(model, "backbone", model)
    return str(getattr(backbone, "architecture", None) or type(backbone).__name__).removeprefix("anyres_")


def check_weights(model: nn.Module, name: str | None = None) -> None:
    """Raise UserError if any weight of the model is not finite; `name` (default: architecture) is for the message."""
    weights = {
        key: value
        for key, value in model.state_dict().items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    if not weights:
        return
    finite = torch.stack(
        [value.isfinite().all() for value in weights.values()]
    ).tolist()  # a single wait for the device
    bad = [key for key, good in zip(weights, finite, strict=True) if not good]
    if bad:
        raise UserError(
            f"{len(bad)} of the {len(weights)} weights of {name or model_name(model)} contain NaN or infinity, the "
            f"first is {bad[0]}: its training diverged or its file is damaged; use other weights"
        )


def check_outputs(model: nn.Module | str, finite: bool, what: str) -> None:
    """Raise UserError if the model's outputs for `what` are not `finite`."""
    if not finite:
        raise UserError(
            f"the outputs of {model_name(model)} for {what} contain NaN or infinity: its values overflow the precision "
            "(use precision float32), or its training diverged (use other weights)"
        )


def check_found(
    model: nn.Module | str, found: Sequence[dict[str, Tensor]], layers: Sequence[Tensor], what: str
) -> None:
    """Raise UserError if a detector's results for the images `what`, or any of its `layers_watched`, are not finite."""
    finite = [*layers, *(values.isfinite().all() for objects in found for values in objects.values())]
    check_outputs(model, not finite or bool(torch.stack(finite).all()), what)


@contextmanager
def layers_watched(module: nn.Module) -> Iterator[list[Tensor]]:
    """Record, for every call of a linear layer or convolution in `module`, whether its output is finite.

    A detector's results do not show this, because the selection of boxes drops scores and boxes that are NaN.
    """
    finite: list[Tensor] = []

    def look(layer: nn.Module, inputs: object, output: Tensor) -> None:
        finite.append(output.isfinite().all())

    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d))
    handles = [layer.register_forward_hook(look) for layer in layers]
    try:
        yield finite
    finally:
        for handle in handles:
            handle.remove()
