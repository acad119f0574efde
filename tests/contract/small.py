"""Small networks of every registered model: the published class with fewer and narrower layers."""

from __future__ import annotations

from typing import Any

import torch

from anyres.backbone import Backbone
from anyres.plain import Plain
from anyres.registry import create_model, entries

SMALL: dict[type[Backbone], dict[str, Any]] = {
    Plain: {"embed_dim": 48, "depth": 3, "num_heads": 3},
}
"""Constructor arguments that make a model of each skeleton quick, everything else as published."""

SIZES = [(97, 131), (64, 448), (224, 224), (33, 32), (160, 96), (128, 128), (131, 97), (80, 72), (50, 200), None]
"""Ten sizes: odd, prime, tall, wide, divisible; None stands for the model's minimum."""


def small(name: str, **options: Any) -> Backbone:
    """A quick model of this name in eval mode; what initialisation leaves at zero gets values, so that nothing is
    skipped unseen."""
    torch.manual_seed(0)
    family = entries()[name].family
    args = next(args for skeleton, args in SMALL.items() if issubclass(family.model, skeleton))
    model = create_model(name, **{"num_classes": 7, **args, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model.eval()


def image(batch: int, size: tuple[int, int] | None, model: Backbone, seed: int = 0) -> torch.Tensor:
    height, width = size or (model.minimum_size, model.minimum_size)
    return torch.randn(batch, model.in_chans, height, width, generator=torch.Generator().manual_seed(seed))
