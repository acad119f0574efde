"""Semantic segmentation at any image size.

A `Segmenter` is a dense backbone with one of the heads in `heads.py`, trained with `segmentation_loss`. `segment` and
`predict_probabilities` run it on whole images or with sliding-window inference, at several scales, and flipped.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from anyres.errors import UserError
from anyres.layers.init import init_linear_and_convolution
from anyres.models._backbone import Backbone, pair
from anyres.tasks.network import TaskModel, is_count, leave_inputs_alone
from anyres.tasks.objective import Objective
from anyres.tasks.segmentation.heads import HEADS, classifier, resize

AUXILIARY_CHANNELS = 256
IGNORE = 255
"""Label of pixels that are ignored in training and evaluation."""


class Segmenter(TaskModel):
    """A dense backbone with a segmentation head: (B, in_chans, H, W) → logits (B, num_classes, H, W).

    Args:
        backbone: a model in its dense form. The final norm of plain models is removed if it would apply only to the
            last map, as in the published DeiT and ResFormer baselines.
        head: "upernet", "semantic_fpn" or "segformer".
        channels: width of the head; by default the published one (512, 256, 256).
        auxiliary: whether to train a second head: 3x3 convolution, norm, ReLU, dropout and 1x1 convolution on the third
            map, or on the last one if all maps have the same stride. By default only with UPerNet.

    Raises:
        UserError: for a backbone without feature maps of images, and for an unknown head.
    """

    task = "segmentation"

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        head: str = "upernet",
        channels: int | None = None,
        auxiliary: bool | None = None,
    ) -> None:
        if head not in HEADS:
            near = difflib.get_close_matches(head, HEADS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(HEADS)}."
            raise UserError(f"There is no segmentation head {head!r}: {hint}")
        kind, width = HEADS[head]
        channels = width if channels is None else channels
        if not is_count(channels, least=2):
            raise UserError(f"channels is {channels!r}; it must be a whole number of at least 2, such as {width}.")
        auxiliary = head == "upernet" if auxiliary is None else auxiliary
        super().__init__(backbone, num_classes, head=head, channels=channels, auxiliary=auxiliary)
        info = levels_of(backbone)
        backbone.make_maps_alike()
        self.head = kind(info, num_classes, channels)
        self.auxiliary: nn.Module | None = None
        if auxiliary:
            self.auxiliary_level = 2 if info[0]["reduction"] < info[-1]["reduction"] else -1
            dim = min(AUXILIARY_CHANNELS, channels)
            conv = Conv2dNormActivation(info[self.auxiliary_level]["num_chs"], dim)
            self.auxiliary = nn.Sequential(conv.apply(init_linear_and_convolution), classifier(dim, num_classes))
        leave_inputs_alone(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) → logits (B, num_classes, H, W)."""
        return resize(self.head(self.backbone(x)), x.shape[-2:])

    def forward_train(self, view: Tensor, targets: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return the outputs for images (B, in_chans, H, W), by name.

        "logits" (B, num_classes, h, w) have the size of the first map. "aux" are those of the auxiliary head, if there
        is one, at the size of its map. With "gap" in `targets`, "gap" is the mean of the last map (B, C).
        """
        maps = self.backbone(view)
        out = {"logits": self.head(maps)}
        if self.auxiliary is not None:
            out["aux"] = self.auxiliary(maps[self.auxiliary_level])
        if "gap" in targets:
            out["gap"] = maps[-1].mean((2, 3))
        return out


def levels_of(backbone: Backbone) -> list[dict[str, Any]]:
    """Return the `feature_info` of a dense image backbone's maps. Raises UserError if the backbone is not one."""
    if not getattr(backbone, "dense", False) or backbone.num_frames is not None:
        name = (backbone.architecture or type(backbone).__name__).removeprefix("anyres_")
        raise UserError(f"{name} does not return feature maps of images: build an image model with dense=True.")
    return backbone.dense_info


# Training -----------------------------------------------------------------------------------------------------------


def segmentation_loss(
    outputs: dict[str, Tensor], labels: Tensor, auxiliary_weight: float = 0.4, ignore_index: int = IGNORE
) -> Tensor:
    """Return the cross-entropy of "logits" plus `auxiliary_weight` times that of "aux", if present, a float32 scalar.

    Logits (B, K, h, w) are resized to the labels (B, H, W). The mean is over the pixels whose label is not
    `ignore_index`, or 0 if there are no such pixels. The papers do not say whether published runs divide by the number
    of these pixels or of all pixels in the crop.
    """
    loss = _pixel_loss(outputs["logits"], labels, ignore_index)
    if "aux" in outputs:
        loss = loss + auxiliary_weight * _pixel_loss(outputs["aux"], labels, ignore_index)
    return loss


class SegmentationObjective(Objective):
    """`segmentation_loss` as the training loss of the task."""

    def __call__(self, outputs: dict[str, Tensor], target: Tensor, view: Tensor) -> Tensor:
        return segmentation_loss(outputs, target)


def _pixel_loss(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    logits = resize(logits.float(), labels.shape[-2:])
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


# Inference ----------------------------------------------------------------------------------------------------------

Model = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) → logits (B, K, H, W)."""


def segment(model: Model, image: Tensor, size_out: Sequence[int] | None = None, **options: Any) -> Tensor:
    """Return the most probable class of every pixel (B, *size_out) for normalised images (B, C, H, W).

    `options` are those of `predict_probabilities`.
    """
    return predict_probabilities(model, image, size_out, **options).argmax(1)


@torch.inference_mode()
def predict_probabilities(
    model: Model,
    image: Tensor,
    size_out: Sequence[int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
) -> Tensor:
    """Return class probabilities (B, K, *size_out) in float32 for normalised images (B, C, H, W).

    The logits of each view are resized to `size_out`, and their softmax is averaged over the views. With a single view,
    classes are ranked as in the published single-scale test. The train/eval mode of the model is not changed.

    Args:
        size_out: (height, width) of the result, such as that of the original image; by default that of `image`.
        scales: factors by which to scale the image, one view each. Sides are rounded, and never below the model's
            minimum. Published "ms+flip": 0.5, 0.75, 1, 1.25, 1.5, 1.75 with `flip`.
        flip: also use a horizontally flipped view at each scale.
        window: side or (height, width) of the tiles for sliding-window inference; by default, the whole image.
        stride: stride of the tiles; by default two thirds of their size.

    Raises:
        UserError: if `scales`, `window` or `stride` is not valid.
    """
    if not scales or min(scales) <= 0:
        raise UserError(f"scales={tuple(scales)} is not possible: give one or several numbers above 0, such as 1.0.")
    if window is None and stride is not None:
        raise UserError(f"stride={stride} is given without a window: give window as well, or neither.")
    size_out = size_out or image.shape[-2:]

    def probabilities(scale: float, mirrored: bool) -> Tensor:
        x = _scaled(image, scale, getattr(model, "minimum_size", 1))
        x = x.flip(-1) if mirrored else x
        logits = model(x) if window is None else slide(model, x, window, stride)
        logits = logits.flip(-1) if mirrored else logits
        return resize(logits.float(), size_out).softmax(1)

    views = list(product(scales, (False, True) if flip else (False,)))
    return reduce(Tensor.add_, (probabilities(*view) for view in views)).div_(len(views))


def _scaled(image: Tensor, scale: float, minimum: int) -> Tensor:
    """Scale images (B, C, H, W) to sides of at least `minimum`, with antialiasing."""
    size = [max(round(side * scale), minimum) for side in image.shape[-2:]]
    if size == [*image.shape[-2:]]:
        return image
    return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)


def slide(
    model: Model, image: Tensor, window: int | Sequence[int], stride: int | Sequence[int] | None = None
) -> Tensor:
    """Return logits (B, K, H, W) in float32 by sliding-window inference on images (B, C, H, W).

    The logits are averaged where tiles overlap. The last tile in a row or column ends at the border; an image smaller
    than a tile is one tile. `window` and `stride` are as in `predict_probabilities`.

    Raises UserError for a window or stride below 1, and for a stride that would skip pixels.
    """
    height, width = pair(window)
    down, right = (max(height * 2 // 3, 1), max(width * 2 // 3, 1)) if stride is None else pair(stride)
    if not (1 <= down <= height and 1 <= right <= width):
        raise UserError(
            f"stride={stride} does not fit window={window}: give a stride of at least 1 and at most the window's side."
        )
    H, W = image.shape[-2:]
    total: Tensor | None = None
    count = image.new_zeros(H, W, dtype=torch.float32)
    for top, left in product(_starts(H, height, down), _starts(W, width, right)):
        part = (..., slice(top, top + height), slice(left, left + width))
        logits = model(image[part]).float()
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], H, W)
        total[part] += logits
        count[part] += 1
    assert total is not None
    return total.div_(count)


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Return the start positions of the tiles along a side."""
    last = max(side - window, 0)
    return [*range(0, last, stride), last]
