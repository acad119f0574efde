"""Weight initialisation shared by several papers."""

from __future__ import annotations

import math

import torch
from torch import nn


def init_linear(module: nn.Module) -> None:
    """Initialise as in ViT: linear weights from a truncated normal with σ = 0.02, biases zero; other modules are
    unchanged."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def init_scaled(model: nn.Module) -> None:
    """Initialise for training narrow networks from scratch: linear and convolution weights with σ = 1 / √inputs.

    The weights are truncated normal. The output of a layer is then as large as its input at any width. ViT's 0.02 is
    the value for 2500 inputs; with a few dozen inputs, it makes the layers contribute almost nothing at first. Weights
    that are initialised to zero stay zero.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.any():
            nn.init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)


def init_linear_and_convolution(module: nn.Module) -> None:
    """Initialise linear layers as `init_linear` does, and convolutions from a normal with σ = √(2 / fan_out).

    fan_out is k²·C_out / groups (PVT v2, Twins, Shunted, ScalableViT).
    """
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
