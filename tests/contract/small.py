"""Small networks of every registered model: the published class with fewer and narrower layers."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch

from anyres.models._backbone import Backbone
from anyres.models._registry import create_model, entries
from tests.systems import system
from tests.typed import as_a

SIZES = [(97, 131), (64, 448), (224, 224), (33, 32), (160, 96), (128, 128), (131, 97), (80, 72), (50, 200), None]
"""Ten sizes: odd, prime, tall, wide, divisible; None stands for the model's minimum."""


def small_args(name: str) -> dict[str, Any]:
    """What makes a model of this name quick."""
    return next(args for pattern, args in system(name).SMALL.items() if fnmatchcase(name, pattern))


def distinct_models() -> list[str]:
    """The registered names, without those whose small network is the same as one before: sizes of one family often
    differ in nothing else than what `SMALL` replaces."""
    networks: dict[tuple[Any, str], str] = {}
    for name, (family, variant) in entries().items():
        args = {**variant.args, **small_args(name)}
        networks.setdefault((family.model, repr(sorted(args.items()))), name)
    return list(networks.values())


def small(name: str, **options: Any) -> Backbone:
    """A quick model of this name in eval mode; what initialisation leaves at zero gets values, so that nothing is
    skipped unseen."""
    torch.manual_seed(0)
    args = small_args(name)
    model = as_a(Backbone, create_model(name, **{"num_classes": 7, **args, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model.eval()


def image(batch: int, size: tuple[int, int] | None, model: Backbone, seed: int = 0) -> torch.Tensor:
    """Random images, or clips of the native length for a video model."""
    height, width = size or (model.minimum_size, model.minimum_size)
    frames = () if model.num_frames is None else (model.num_frames,)
    return torch.randn(batch, model.in_chans, *frames, height, width, generator=torch.Generator().manual_seed(seed))
