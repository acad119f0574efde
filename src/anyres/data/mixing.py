"""Mixup, CutMix and label smoothing over one or several views of a batch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyres.data.seeding import generator
from anyres.errors import UserError

Box = tuple[int, int, int, int]
"""(top, bottom, left, right) in pixels; bottom and right are exclusive."""


@dataclass(frozen=True)
class Mixing:
    """Mix every image with its partner, the image at the mirrored position in the batch, and mix their labels.

    A batch is mixed with probability `mix_prob`: by CutMix with probability `switch_prob`, otherwise by mixup. `cutmix`
    and `mixup` are the parameters of the Beta distributions; if only one of them is above 0, only that method is used.
    `separate_mix` False makes one draw for all views: they share the mode and λ, the CutMix box is drawn for the
    largest (first) view and scaled to the others with truncation, and λ is corrected by the clipped area at the largest
    size. `separate_mix` True draws for each view independently.

    Draws depend only on (seed, epoch, step), so they are the same on every rank. Source: mixup (Zhang et al., ICLR
    2018) and CutMix (Yun et al., ICCV 2019) with the settings of DeiT (Touvron et al., ICML 2021, table 9).
    """

    num_classes: int
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    smoothing: float = 0.1
    separate_mix: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UserError(f"{name} {getattr(self, name)} must be 0 (off) or a positive number")
        for name in ("mix_prob", "switch_prob", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} must be from 0 to 1")
        if self.num_classes < 1:
            raise UserError(f"num_classes {self.num_classes} must be at least 1")

    def __call__(
        self, views: Sequence[Tensor], labels: Tensor, epoch: int, step: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Mix views (B, C, H_i, W_i), given from large to small, with labels (B,).

        Returns new views, and a soft target (B, K) for each view.
        """
        soft = smooth_labels(labels, self.num_classes, self.smoothing, views[0].dtype)
        mixed: list[Tensor] = []
        targets: list[Tensor] = []
        if self.separate_mix:
            for place, view in enumerate(views):
                lam, box = self._draw(generator("mix", self.seed, epoch, step, place), *view.shape[-2:])
                mixed.append(_mix_images(view, lam, box))
                targets.append(_mix_targets(soft, lam))
            return mixed, targets
        height, width = views[0].shape[-2:]
        lam, box = self._draw(generator("mix", self.seed, epoch, step), height, width)
        for view in views:
            mixed.append(
                _mix_images(view, lam, box and _scale_box(box, (height, width), (view.shape[-2], view.shape[-1])))
            )
        return mixed, [_mix_targets(soft, lam)] * len(views)

    def _draw(self, rng: random.Random, height: int, width: int) -> tuple[float, Box | None]:
        """Return λ, the weight of the image itself, and the CutMix box, or None for mixup."""
        if rng.random() >= self.mix_prob or (self.mixup == 0 and self.cutmix == 0):
            return 1.0, None
        cut = rng.random() < self.switch_prob if self.mixup > 0 and self.cutmix > 0 else self.cutmix > 0
        if not cut:
            return rng.betavariate(self.mixup, self.mixup), None
        box = _draw_box(rng, height, width, rng.betavariate(self.cutmix, self.cutmix))
        top, bottom, left, right = box
        return 1 - (bottom - top) * (right - left) / (height * width), box


def smooth_labels(labels: Tensor, num_classes: int, smoothing: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return smoothed targets (B, K): smoothing/K everywhere, plus 1 - smoothing at the label."""
    soft = torch.full((len(labels), num_classes), smoothing / num_classes, dtype=dtype, device=labels.device)
    return soft.scatter_(1, labels[:, None], 1 - smoothing + smoothing / num_classes)


def _draw_box(rng: random.Random, height: int, width: int, lam: float) -> Box:
    """Draw a box with a share 1-λ of the area around a random centre, clipped at the borders (CutMix, section 3)."""
    side = math.sqrt(1 - lam)
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    row, column = rng.randrange(height), rng.randrange(width)
    return (
        max(row - half_height, 0),
        min(row + half_height, height),
        max(column - half_width, 0),
        min(column + half_width, width),
    )


def _scale_box(box: Box, size: tuple[int, int], new: tuple[int, int]) -> Box:
    top, bottom, left, right = box
    return (
        top * new[0] // size[0],
        bottom * new[0] // size[0],
        left * new[1] // size[1],
        right * new[1] // size[1],
    )


def _mix_images(images: Tensor, lam: float, box: Box | None) -> Tensor:
    if box is None:
        return images if lam == 1 else images.flip(0).mul_(1 - lam).add_(images, alpha=lam)
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[..., top:bottom, left:right].flip(0)
    return mixed


def _mix_targets(soft: Tensor, lam: float) -> Tensor:
    return soft * lam + soft.flip(0) * (1 - lam)
