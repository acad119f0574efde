"""Anchors, region proposals and RoI pooling as in the papers, and RetinaNet's head.

We use torchvision's modules where they agree with the papers and replace them where they do not. All coordinates are
float32, even if the network runs in another precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import roi_align, sigmoid_focal_loss

Objects = dict[str, Tensor]
"""Ground truth of an image (boxes, labels, …), or detections in it (with scores)."""


class Anchors(AnchorGenerator):
    """Anchors at every position of every level, with sides `scales` times the stride and ratios 1/2, 1 and 2.

    torchvision rounds the sides of its anchors. It also computes the stride as the side of the image divided by that of
    the map, which is wrong if the size of the map was rounded up.
    """

    def __init__(self, strides: Sequence[float], scales: Sequence[float]) -> None:
        super().__init__(
            tuple(tuple(scale * stride for scale in scales) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides)
        )
        self.strides = tuple(strides)

    def generate_anchors(self, sizes: Sequence[float], ratios: Sequence[float], *_: object, **__: object) -> Tensor:
        """Return anchors centred at the origin, (sizes · ratios, 4)."""
        size, root = torch.tensor(sizes), torch.tensor(ratios).sqrt()
        width, height = (size / root[:, None]).flatten(), (size * root[:, None]).flatten()
        return torch.stack((-width, -height, width, height), dim=1) / 2

    def forward(self, images: ImageList, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors of each image in the batch, (positions · anchors, 4), the same for all images."""
        self.set_cell_anchors(torch.float32, levels[0].device)
        grids = [level.shape[-2:] for level in levels]
        anchors = torch.cat(self.grid_anchors(grids, [(stride, stride) for stride in self.strides]))
        return [anchors] * len(images.image_sizes)


class ProposalHead(RPNHead):
    """RPN head: 3x3 convolutions, then the objectness and box deltas of every anchor, in float32."""

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(levels)
        return [x.float() for x in objectness], [x.float() for x in deltas]


class Proposals(RegionProposalNetwork):
    """Region proposal network (Ren et al., NeurIPS 2015) with L1 loss.

    Proposals whose centre is outside the image, that is in its padding, are never selected.
    """

    def filter_proposals(
        self, proposals: Tensor, objectness: Tensor, sizes: list[tuple[int, int]], counts: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the best proposals of each image, clipped to its true size, and their scores.

        Args:
            proposals: (B, A, 4).
            objectness: logits of the proposals.
            sizes: true (height, width) of each image.
            counts: number of anchors in each level.
        """
        height, width = torch.tensor(sizes, device=proposals.device, dtype=proposals.dtype).T[:, :, None]
        x, y = ((proposals[..., :2] + proposals[..., 2:]) / 2).unbind(-1)
        outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
        objectness = objectness.detach().view_as(x).masked_fill(outside, -math.inf)
        return super().filter_proposals(proposals, objectness, sizes, counts)

    def compute_loss(
        self, objectness: Tensor, deltas: Tensor, labels: list[Tensor], wanted: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return (objectness loss, box loss) over the sampled anchors; only positive ones count in the box loss."""
        positive, negative = (torch.where(torch.cat(part))[0] for part in self.fg_bg_sampler(labels))
        sampled = torch.cat((positive, negative))
        count = max(len(sampled), 1)
        box = F.l1_loss(deltas[positive], torch.cat(wanted)[positive], reduction="sum") / count
        logits = objectness.flatten()[sampled]
        found = F.binary_cross_entropy_with_logits(logits, torch.cat(labels)[sampled], reduction="sum") / count
        return found, box


class RegionPool(nn.Module):
    """RoIAlign with exact half-pixel positions and adaptive sampling, from the level that fits the area of a region.

    The level is that of Lin et al. (CVPR 2017, equation 1): stride 16 for 224x224 pixels. torchvision's own module uses
    the older sampling, shifted by half a cell, and remembers the size of its first input.
    """

    def __init__(self, strides: Sequence[float], side: int) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.output_size = (side, side)

    def forward(self, levels: Sequence[Tensor], boxes: Sequence[Tensor], _: object = None) -> Tensor:
        """Levels (B, C, h, w) and each image's boxes (n, 4) → (all boxes, C, side, side)."""
        rois = torch.cat([F.pad(part, (1, 0), value=i) for i, part in enumerate(boxes)])
        extent = (rois[:, 3:] - rois[:, 1:3]).clamp(min=0).prod(1).sqrt()
        level = (extent * (16 / 224 / self.strides[0]) + 1e-6).log2().floor().clamp(0, len(self.strides) - 1)
        order, pooled = [], []
        for i, stride in enumerate(self.strides):
            order.append(torch.where(level == i)[0])
            pooled.append(roi_align(levels[i], rois[order[-1]], self.output_size, 1 / stride, 0, aligned=True))
        return torch.cat(pooled)[torch.cat(order).argsort()]


class TwoStage(nn.Module):
    """Two-stage detector: region proposals, then RoI heads."""

    def __init__(self, rpn: Proposals, regions: nn.Module) -> None:
        super().__init__()
        self.rpn = rpn
        self.regions = regions

    def forward(
        self, images: ImageList, levels: list[Tensor], objects: list[Objects] | None = None
    ) -> tuple[list[Objects], dict[str, Tensor]]:
        """Return (detections of each image, losses), one of which is empty. Labels start at 0."""
        proposals, losses = self.rpn(images, dict(enumerate(levels)), objects)
        found, more = self.regions(levels, proposals, images.image_sizes, objects)
        return found, {**losses, **more}


class FocalHead(RetinaNetHead):
    """RetinaNet's head: two towers of four convolutions (Lin et al., ICCV 2017).

    The losses are divided by the number of positive anchors in the batch; torchvision normalises each image separately.
    """

    def forward(self, levels: list[Tensor]) -> dict[str, Tensor]:
        return {name: x.float() for name, x in super().forward(levels).items()}

    def compute_loss(
        self, objects: list[Objects], outputs: dict[str, Tensor], anchors: list[Tensor], matched: list[Tensor]
    ) -> dict[str, Tensor]:
        """Return the losses. `matched` (A,) is the object of each anchor, or a negative number, for each image."""
        logits, deltas = outputs["cls_logits"], outputs["bbox_regression"]
        classes, boxes, places = torch.zeros_like(logits), [], []
        for i, (found, match) in enumerate(zip(objects, matched, strict=True)):
            positive = torch.where(match >= 0)[0]
            classes[i, positive, found["labels"][match[positive]]] = 1
            boxes.append(found["boxes"][match[positive]])
            places.append(anchors[i][positive])
        match = torch.stack(matched)
        judged = match != Matcher.BETWEEN_THRESHOLDS
        count = (match >= 0).sum().clamp(min=1)
        wanted = self.regression_head.box_coder.encode_single(torch.cat(boxes), torch.cat(places))
        return {
            "loss_classifier": sigmoid_focal_loss(logits[judged], classes[judged], reduction="sum") / count,
            "loss_box_reg": F.l1_loss(deltas[match >= 0], wanted, reduction="sum") / count,
        }


class OneStage(RetinaNet):
    """RetinaNet on the levels of a neck, with torchvision's matching and box selection."""

    def __init__(
        self, anchors: Anchors, head: FocalHead, score_threshold: float, nms_threshold: float, detections: int
    ) -> None:
        nn.Module.__init__(self)  # the parent's constructor would add a backbone and a resize, which are elsewhere here
        self.anchor_generator = anchors
        self.head = head
        self.proposal_matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
        self.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.score_thresh = score_threshold
        self.nms_thresh = nms_threshold
        self.detections_per_img = detections
        self.topk_candidates = 1000

    def forward(
        self, images: ImageList, levels: list[Tensor], objects: list[Objects] | None = None
    ) -> tuple[list[Objects], dict[str, Tensor]]:
        """Return (detections of each image, losses), one of which is empty. Labels start at 0."""
        outputs = self.head(levels)
        anchors = self.anchor_generator(images, levels)
        if objects is not None:
            return [], self.compute_loss(objects, outputs, anchors)
        each = len(self.anchor_generator.cell_anchors[0])
        counts = [level.shape[-2] * level.shape[-1] * each for level in levels]
        by_level = {name: x.split(counts, dim=1) for name, x in outputs.items()}
        places = [part.split(counts) for part in anchors]
        return self.postprocess_detections(by_level, places, images.image_sizes), {}
