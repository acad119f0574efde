"""The schedule of input sizes: which sizes each training step uses."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

from anyres.data.seeding import generator
from anyres.errors import UserError
from anyres.shapes import Size

MAX_SIDE = 65536
MAX_SIZES = 10_000
LONG_TRAINING = 300
"""Epochs from which mode "auto" shows every image at all sizes."""


def parse_sizes(text: str) -> list[Size]:
    """Parse a comma-separated list of sizes, keeping their order.

    An entry is a side ("224" is 224x224), HEIGHTxWIDTH ("224x320"), or a range of squares START:STOP:STEP with both
    ends included ("96:640:32").

    >>> parse_sizes("32,24x16,96:160:32")
    [(32, 32), (24, 16), (96, 96), (128, 128), (160, 160)]

    Raises UserError for anything else, for sides below 1 or above 65536, and for more than 10,000 sizes.
    """
    sizes: list[Size] = []
    for entry in text.split(","):
        # int() rejects thousands of digits; ten or more are out of range anyway.
        numbers = [int(digits) if len(digits) < 10 else 0 for digits in re.findall(r"[0-9]+", entry)]
        if not numbers or any(not 1 <= number <= MAX_SIDE for number in numbers):
            raise UserError(_complaint(entry, text))
        if re.fullmatch(r"\s*[0-9]+\s*", entry, re.ASCII):
            sizes.append((numbers[0], numbers[0]))
        elif re.fullmatch(r"\s*[0-9]+\s*[xX×]\s*[0-9]+\s*", entry, re.ASCII):
            sizes.append((numbers[0], numbers[1]))
        elif re.fullmatch(r"\s*[0-9]+\s*:\s*[0-9]+\s*:\s*[0-9]+\s*", entry, re.ASCII) and numbers[0] <= numbers[1]:
            sizes.extend((side, side) for side in range(numbers[0], numbers[1] + 1, numbers[2]))
        else:
            raise UserError(_complaint(entry, text))
        if len(sizes) > MAX_SIZES:
            raise UserError(f"sizes {text[:80]!r} are more than {MAX_SIZES}: use a larger step")
    return sizes


def _complaint(entry: str, text: str) -> str:
    where = "" if entry == text else f" in {text[:80]!r}"
    return (
        f"size {entry[:80]!r}{where} is not a side (224), a HEIGHTxWIDTH (224x320) or a rising range START:STOP:STEP "
        f"(96:640:32) with sides from 1 to {MAX_SIDE}"
    )


class SizeSchedule:
    """The training sizes of every step.

    `mode` "replicate" uses all sizes in each step and shows every image at each of them (ResFormer, Tian et al., CVPR
    2023). With `sizes_per_step` k, it uses k neighbouring sizes, starting at index (step mod (n-k+1)). `mode` "sample"
    draws `sizes_per_step` different sizes (by default one) for each "iteration" or "epoch", the same on every rank.
    Single sizes drawn per iteration come in rounds, in which each occurs once, so that none is missed for long.
    "auto" is "sample" in runs of fewer than 300 `epochs`, where it wins at equal cost (docs/science.md), and
    "replicate" in longer ones, the length of ResFormer's published training.

    `curriculum` makes small sizes likelier at the start of the `epochs` and large ones at the end: in the logarithm of
    its side, a size is weighted by a normal curve (sigma 0.35 of the range) around the share of the epochs done, over a
    floor of 0.15, so that no size is forgotten.

    `sizes` are (height, width) in any order; `all_sizes` has them in descending order of area. Raises UserError if
    `sizes` is empty or has duplicates, or if `sizes_per_step` exceeds the number of sizes.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        mode: Literal["replicate", "sample", "auto"] = "replicate",
        per: Literal["iteration", "epoch"] = "iteration",
        sizes_per_step: int | None = None,
        curriculum: bool = False,
        epochs: int = 1,
        seed: int = 0,
    ) -> None:
        ordered = sorted(((int(height), int(width)) for height, width in sizes), key=lambda size: -size[0] * size[1])
        if not ordered:
            raise UserError("sizes are empty: give at least one training size")
        if any(min(size) < 1 for size in ordered):
            raise UserError(f"sizes {ordered} must be pairs (height, width) of positive integers")
        if len(set(ordered)) < len(ordered):
            raise UserError(f"sizes {ordered} hold one size twice: leave the second out")
        if mode not in ("replicate", "sample", "auto"):
            raise UserError(f"mode {mode!r} must be 'replicate', 'sample' or 'auto'")
        if mode == "auto":
            mode = "sample" if epochs < LONG_TRAINING else "replicate"
        if per not in ("iteration", "epoch"):
            raise UserError(f"per {per!r} must be 'iteration' or 'epoch'")
        if sizes_per_step is not None and not 1 <= sizes_per_step <= len(ordered):
            raise UserError(f"sizes_per_step {sizes_per_step} must be from 1 to the number of sizes, {len(ordered)}")
        if curriculum and (mode != "sample" or len(ordered) == 1):
            raise UserError("curriculum chooses among several sizes: set mode sample and give two sizes or more")
        self.all_sizes = tuple(ordered)
        self.mode = mode
        self.per = per
        self.sizes_per_step = sizes_per_step
        self.curriculum = curriculum
        self.epochs = epochs
        self.seed = seed

    def sizes(self, epoch: int, step: int) -> list[Size]:
        """Return the sizes of a step in descending order of area; `step` counts from the start of training."""
        count = len(self.all_sizes)
        if self.mode == "replicate":
            shown = self.sizes_per_step or count
            start = step % (count - shown + 1)
            return list(self.all_sizes[start : start + shown])
        place = step if self.per == "iteration" else epoch
        shown = self.sizes_per_step or 1
        if self.curriculum:
            weights = self._weights(epoch / max(self.epochs - 1, 1))
            rng = generator("size", self.seed, self.per, place)
            # Weighted draws without replacement (Efraimidis and Spirakis, 2006).
            chosen = sorted(range(count), key=lambda index: -(rng.random() ** (1 / weights[index])))[:shown]
        elif shown == 1 and self.per == "iteration":
            chosen = [generator("size", self.seed, "round", place // count).sample(range(count), count)[place % count]]
        else:
            chosen = generator("size", self.seed, self.per, place).sample(range(count), shown)
        return [self.all_sizes[index] for index in sorted(chosen)]

    def _weights(self, done: float) -> list[float]:
        """Return the weight of each size when this share of the epochs is done."""
        logs = [math.log(height * width) for height, width in self.all_sizes]
        range_ = max(logs[0] - logs[-1], 1e-9)
        return [0.15 + math.exp(-((((value - logs[-1]) / range_ - done) / 0.35) ** 2) / 2) for value in logs]
