"""RoI heads: boxes in one stage (Faster, Mask and Keypoint R-CNN) or in a cascade of stages, masks and keypoints.

In Cascade R-CNN (Cai and Vasconcelos, CVPR 2018), each stage refines the boxes of the previous one and is trained with
a higher IoU threshold. Faster R-CNN is a cascade with one stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads, keypointrcnn_inference, keypointrcnn_loss
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss, roi_align

from anyres.tasks.detection.heads import Objects

IOUS = (0.5, 0.6, 0.7)
"""IoU threshold for positive proposals, by stage."""
WEIGHTS = (1.0, 0.5, 0.25)
"""Loss weight of each stage."""
GIOU_WEIGHT = 10.0


class BoxPredictor(nn.Module):
    """Features (n, hidden) → logits (n, 1 + classes), background first, and deltas (n, classes or 1, 4)."""

    def __init__(self, hidden: int, num_classes: int, class_specific: bool) -> None:
        super().__init__()
        self.cls_score = nn.Linear(hidden, 1 + num_classes)
        self.bbox_pred = nn.Linear(hidden, 4 * num_classes if class_specific else 4)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x).float(), self.bbox_pred(x).float().unflatten(1, (-1, 4))


class Stage(RoIHeads):
    """torchvision's matching, sampling and box selection, with the losses of the papers.

    Args:
        iou: IoU threshold for positive proposals; all others are background.
        sharpness: divisor of the standard deviations of the box deltas, 0.1, 0.1, 0.2 and 0.2.
        giou: use the generalised IoU loss for boxes instead of the L1 loss of their deltas.
        batch: number of sampled proposals per image, at most a quarter of them positive.
        parts: heads, pooling layers and thresholds, with the names that `RoIHeads` uses.
    """

    def __init__(self, iou: float, sharpness: float, giou: bool, batch: int, **parts: Any) -> None:
        weights = tuple(sharpness / deviation for deviation in (0.1, 0.1, 0.2, 0.2))
        super().__init__(
            fg_iou_thresh=iou,
            bg_iou_thresh=iou,
            batch_size_per_image=batch,
            positive_fraction=0.25,
            bbox_reg_weights=weights,
            **parts,
        )
        self.giou = giou

    def predict(self, levels: Sequence[Tensor], proposals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the box predictor's logits (n, 1 + classes) and deltas (n, classes or 1, 4) for every proposal."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(levels, proposals)))
        return logits, deltas

    def refine(
        self, logits: Tensor, deltas: Tensor, proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Apply the deltas of the best class to the proposals and clip them to their images; without gradient."""
        chosen = deltas[:, 0]
        if deltas.shape[1] > 1:
            chosen = deltas[torch.arange(len(deltas)), logits[:, 1:].argmax(1)]
        moved = self.box_coder.decode_single(chosen.detach(), torch.cat(list(proposals)))
        parts = moved.split([len(part) for part in proposals])
        return [clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)]

    def box_losses(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, labels: Tensor, wanted: Tensor
    ) -> dict[str, Tensor]:
        """Return the box losses of all sampled proposals (n, 4).

        Args:
            labels: (n,), 0 for background.
            wanted: (n, 4) target deltas.
        """
        count = max(len(labels), 1)
        positive = torch.where(labels > 0)[0]
        deltas = deltas[positive, labels[positive] - 1 if deltas.shape[1] > 1 else 0]
        wanted = wanted[positive]
        if self.giou:
            deltas, wanted = (self.box_coder.decode_single(x, proposals[positive]) for x in (deltas, wanted))
            box = GIOU_WEIGHT * generalized_box_iou_loss(deltas, wanted, reduction="sum")
        else:
            box = F.l1_loss(deltas, wanted, reduction="sum")
        found = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss_classifier": found / count, "loss_box_reg": box / count}

    def mask_logits(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Return the mask logits of all boxes, (n, classes, 28, 28)."""
        logits: Tensor = self.mask_predictor(self.mask_head(self.mask_roi_pool(levels, boxes)))
        return logits.float()

    def keypoint_logits(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Return the keypoint logits of all boxes, (n, keypoints, 56, 56)."""
        logits: Tensor = self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(levels, boxes)))
        return logits.float()

    def train_on(
        self,
        levels: Sequence[Tensor],
        proposals: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        objects: list[Objects],
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return (losses, refined boxes) of a sample of the proposals and ground-truth boxes. Labels start at 1."""
        proposals, matched, labels, wanted = self.select_training_samples(proposals, objects)
        logits, deltas = self.predict(levels, proposals)
        losses = self.box_losses(logits, deltas, *(torch.cat(x) for x in (proposals, labels, wanted)))
        positive = [torch.where(part > 0)[0] for part in labels]
        boxes = [part[i] for part, i in zip(proposals, positive, strict=True)]
        whose = [part[i] for part, i in zip(matched, positive, strict=True)]
        if self.has_mask():
            kinds = torch.cat([part[i] for part, i in zip(labels, positive, strict=True)]) - 1
            masks = self.mask_logits(levels, boxes)[torch.arange(len(kinds)), kinds]
            truth = [
                mask_targets(found["masks"], owner, part, masks.shape[-1])
                for found, owner, part in zip(objects, whose, boxes, strict=True)
            ]
            loss = F.binary_cross_entropy_with_logits(masks, torch.cat(truth), reduction="sum")
            losses["loss_mask"] = loss / max(masks.numel(), 1)
        if self.has_keypoint():
            maps = self.keypoint_logits(levels, boxes)
            losses["loss_keypoint"] = keypointrcnn_loss(maps, boxes, [found["keypoints"] for found in objects], whose)
        return losses, self.refine(logits, deltas, proposals, sizes)


def mask_targets(masks: Tensor, whose: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Crop the masks of an image's objects to boxes and return binary targets (p, side, side).

    Args:
        masks: (n, H, W) masks of the objects.
        whose: (p,) index of the object that each box belongs to.
        boxes: (p, 4).
        side: side of the targets.
    """
    if len(boxes) == 0:
        return boxes.new_empty(0, side, side)
    rois = torch.cat((whose[:, None].to(boxes), boxes), dim=1)
    return (roi_align(masks[:, None].to(boxes), rois, side, 1.0, 0, aligned=True)[:, 0] >= 0.5).to(boxes)


class Cascade(nn.Module):
    """A sequence of stages.

    In training, each stage samples from the boxes of the previous one and the ground truth, and adds its weighted
    losses. The mask loss is weighted only if all stages have a mask head. In evaluation, the class scores are averaged
    over the stages, as "probabilities" or as "logits"; the boxes are those of the last stage, and the masks are the
    mean of all mask heads.
    """

    def __init__(self, stages: Sequence[Stage], average: Literal["probabilities", "logits"] = "probabilities") -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.average = average

    def forward(
        self,
        levels: list[Tensor],
        proposals: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        objects: list[Objects] | None = None,
    ) -> tuple[list[Objects], dict[str, Tensor]]:
        """Return (detections of each image, losses), one of which is empty. Labels start at 0."""
        if objects is None:
            return self.detect(levels, proposals, sizes), {}
        objects = [{**found, "labels": found["labels"] + 1} for found in objects]
        losses: dict[str, Tensor] = {}
        masks_everywhere = all(cast(Stage, stage).has_mask() for stage in self.stages)
        for i, (stage, weight) in enumerate(zip(self.stages, WEIGHTS, strict=False)):
            assert isinstance(stage, Stage)
            part, proposals = stage.train_on(levels, proposals, sizes, objects)
            suffix = f"_{i + 1}" if len(self.stages) > 1 else ""
            weights = {"loss_mask": weight if masks_everywhere else 1.0}
            losses |= {f"{name}{suffix}": weights.get(name, weight) * loss for name, loss in part.items()}
        return [], losses

    def detect(self, levels: list[Tensor], proposals: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Objects]:
        """Return boxes (n, 4), labels (n,), scores (n,), masks (n, 1, 28, 28) inside boxes and keypoints (n, K, 3)."""
        stages: list[Any] = list(self.stages)
        last = stages[-1]
        votes = []
        for stage in stages:
            logits, deltas = stage.predict(levels, proposals)
            votes.append(logits if self.average == "logits" else logits.softmax(1))
            if stage is not last:
                proposals = stage.refine(logits, deltas, proposals, sizes)
        mean = torch.stack(votes).mean(0)
        if self.average == "probabilities":
            mean = mean.log()  # postprocess_detections starts with a softmax
        classes = mean.shape[1]
        # postprocess_detections expects deltas of the background, too.
        deltas = F.pad(deltas.expand(-1, classes - 1, -1), (0, 0, 1, 0)).flatten(1)
        boxes, scores, labels = last.postprocess_detections(mean, deltas, proposals, sizes)
        found = [{"boxes": b, "labels": k - 1, "scores": s} for b, k, s in zip(boxes, labels, scores, strict=True)]
        counts = [len(part) for part in boxes]
        if heads := [stage for stage in stages if stage.has_mask()]:
            kinds = torch.cat(labels) - 1
            masks = torch.stack([head.mask_logits(levels, boxes).sigmoid() for head in heads]).mean(0)
            for out, part in zip(found, masks[torch.arange(len(kinds)), kinds, None].split(counts), strict=True):
                out["masks"] = part
        if last.has_keypoint():
            points, point_scores = keypointrcnn_inference(last.keypoint_logits(levels, boxes), boxes)
            for out, part, score in zip(found, points, point_scores, strict=True):
                out["keypoints"], out["keypoint_scores"] = part, score
        return found
