"""Capture a network as one graph for every batch size, height and width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

GRAPH_MINIMUM = 65
"""Smallest side in pixels of a captured graph: maps of stride 32 then have at least two rows and columns.

torch captures an axis of length 1 as a case of its own."""


def capture(network: nn.Module, example: Tensor, minimum: int = GRAPH_MINIMUM) -> ExportedProgram:
    """Return `torch.export`'s program of a network in eval mode, for any batch size, height and width.

    `example` (B, C, H, W), or (B, C, T, H, W) with the number of frames fixed, has at least two images, and sides of at
    least `minimum`, the smallest side of the program's inputs.
    """
    # The axes are kept general: a proof that no stride is ambiguous is not asked for (as in torch.onnx.export).
    with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        last = example.ndim - 1
        sides = {0: Dim("batch"), last - 1: Dim("height", min=minimum), last: Dim("width", min=minimum)}
        return torch.export.export(network, (example,), dynamic_shapes=(sides,))
