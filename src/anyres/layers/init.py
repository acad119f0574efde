"""Starting values that several papers share."""

from __future__ import annotations

import math

import torch
from torch import nn


def init_linear(module: nn.Module) -> None:
    """ViT's start: truncated normal 0.02 for linear layers, zero biases; everything else keeps its own."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def init_scaled(model: nn.Module) -> None:
    """A start for training narrow networks from nothing: linear layers and convolutions truncated normal with σ =
    1 / √inputs, so that what a layer adds is as large as what it reads, whatever the width. ViT's 0.02 is that of 2500
    inputs; with a few dozen the layers add next to nothing at first. Weights that start at zero stay zero."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.any():
            nn.init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)


def init_linear_and_convolution(module: nn.Module) -> None:
    """As `init_linear`, and convolutions normal with σ = √(2 / fan_out), fan_out = k²·C_out / groups (PVT v2, Twins,
    Shunted, ScalableViT)."""
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
