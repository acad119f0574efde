"""Detectors: a backbone in its dense form, a neck that builds a feature pyramid of equal width, and a head.

The heads are RetinaNet (Lin et al., ICCV 2017), Faster R-CNN (Ren et al., NeurIPS 2015), Mask and Keypoint R-CNN (He et
al., ICCV 2017) on a feature pyramid (Lin et al., CVPR 2017), and Cascade R-CNN (Cai and Vasconcelos, CVPR 2018), built
from torchvision's modules.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from anyres.data.detection_views import DIVISOR, DetectionView
from anyres.errors import UserError
from anyres.layers.init import init_scaled
from anyres.models._backbone import Backbone
from anyres.models._registry import create_model, entries, resolve_name
from anyres.tasks.detection.cascade import IOUS, BoxPredictor, Cascade, Stage
from anyres.tasks.detection.heads import (
    Anchors,
    FocalHead,
    Objects,
    OneStage,
    ProposalHead,
    Proposals,
    RegionPool,
    TwoStage,
)
from anyres.tasks.detection.necks import LEVELS, NORMS, CoarseLevels, FeaturePyramid, SimplePyramid
from anyres.tasks.network import TaskModel, is_count, leave_inputs_alone
from anyres.tasks.objective import Objective

__all__ = ["HEADS", "STYLES", "DetectionView", "Detector", "Settings", "Style", "paste_masks"]

TABLE = re.compile(r"\.(rel_pos_[hw]|rpb)$")
"""Names of parameters that are exempt from weight decay in detectors."""
RETINA_STRIDE = 8
"""Stride of the finest map that RetinaNet uses; the other heads also use stride 4."""
HEADS = ("retinanet", "faster_rcnn", "mask_rcnn", "keypoint_rcnn", "cascade_rcnn", "cascade_mask_rcnn")


class BoxHead(NamedTuple):
    """Layers of a box head: `convs` 3x3 convolutions, then one linear layer, or two if there are no convolutions."""

    convs: int = 0
    norm: str = "none"


class Style(NamedTuple):
    """Details of the heads that differ between papers. Norms are "none", "batch" or "layer"."""

    neck_norm: str = "none"
    rpn_convs: int = 1
    box: BoxHead = BoxHead()
    mask_norm: str = "none"
    cascade: Literal["swin", "detectron2"] = "swin"
    """"swin": class-specific boxes, generalised IoU loss, a mask head in every stage, averaged logits. "detectron2":
    class-agnostic boxes, L1 loss, a single mask head on the boxes of the last stage, averaged probabilities."""
    cascade_box: BoxHead = BoxHead(4, "batch")


STYLES = {
    "standard": Style(),
    "detectron2": Style(cascade="detectron2", cascade_box=BoxHead()),
    "mvitv2": Style(rpn_convs=2, mask_norm="batch", cascade="detectron2"),
    "gpvit": Style("batch", box=BoxHead(4, "batch")),
    "vitdet": Style("layer", 2, BoxHead(4, "layer"), "layer", "detectron2", BoxHead(4, "layer")),
}
"""Styles of, in this order: PVT, Swin and most others; MPViT and RegionViT; MViTv2; GPViT; plain models."""


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a head. The defaults are those of the papers, for images of 800 pixels."""

    channels: int = 256
    """Width of the neck and of the convolutions in the heads."""
    hidden: int = 1024
    """Width of the box head's linear layers."""
    anchor_scale: float | None = None
    """Side of a level's (smallest) square anchor in strides; by default 8, or 4 for RetinaNet."""
    rpn_pre_nms: Sequence[int] = (2000, 1000)
    """Proposals per level before NMS, in training and in evaluation."""
    rpn_post_nms: int = 1000
    """Proposals per image after NMS."""
    rpn_batch: int = 256
    """Sampled anchors per image in the RPN's loss."""
    box_batch: int = 512
    """Sampled proposals per image in the heads' losses."""
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections: int = 100
    """Largest number of detections per image."""
    num_keypoints: int = 17

    def __post_init__(self) -> None:
        rules: dict[str, Callable[[Any], bool]] = {
            "a whole number of at least 1": is_count,
            "two whole numbers of at least 1": lambda value: (
                isinstance(value, list | tuple) and len(value) == 2 and all(map(is_count, value))
            ),
            "a number above 0": lambda value: value is None or (isinstance(value, int | float) and value > 0),
            "a number from 0 to 1": lambda value: isinstance(value, int | float) and 0 <= value <= 1,
        }
        words = dict.fromkeys((item.name for item in fields(self)), "a whole number of at least 1")
        words |= {"rpn_pre_nms": "two whole numbers of at least 1", "anchor_scale": "a number above 0"}
        words |= dict.fromkeys(("score_threshold", "nms_threshold"), "a number from 0 to 1")
        for name, rule in words.items():
            value = getattr(self, name)
            if not rules[rule](value):
                raise UserError(f"{name} is {value!r}; it must be {rule}.")


class Detector(TaskModel):
    """Predicts boxes, and masks or keypoints, of the objects in an image.

    Images must be normalised and padded; they are not resized here. Sides need not be multiples of 32.

    Two details follow torchvision rather than the papers: the best anchor of an object is positive even if their
    overlap is small (papers: at least 0.3), and keypoints are read from bicubically upsampled maps.

    In evaluation, padding does not change the detections: each image goes through the network at its own size, rounded
    up to multiples of 32, batched with others of the same size. In training, a padded batch goes through as a whole, as
    published. Backbones do not mask the padding. Proposals and boxes are clipped to the true size of an image, and none
    start in its padding, but the feature maps change. With random weights, the maps of a 224x288 image alone and in a
    batch of 384x384 differ by 1 to 9 % in the mean over the finest level (DynamicViT on ConvNeXt, RegionViT,
    MSG-Transformer, CvT, MPViT, CMT), by 12 to 19 % (the PVTs, Swin, CSWin, P2T, Shunted, Twins, ScalableViT, DeiT,
    ResFormer), by 25 % (DAT), and by 36 to 51 % (DynamicViT on Swin, GPViT, UViT, MViTv2, HAT-Net).

    Args:
        backbone: a model in its dense form, as built by `build`: with an adapter (GPViT), or without a class token and
            with windows of 14x14 tokens in all but four blocks (ResFormer, DeiT).
        num_classes: number of classes, without background.
        head: one of `HEADS`.
        style: a name in `STYLES`; by default that of the backbone's paper.
        options: the fields of `Settings`.

    Raises:
        UserError: for an unknown head, style or option.
    """

    task = "detection"

    def __init__(
        self, backbone: Backbone, num_classes: int, head: str = "mask_rcnn", style: str | None = None, **options: Any
    ) -> None:
        super().__init__(backbone, num_classes, head=head, style=style, **options)
        style = style or backbone.detector.style
        for what, name, known in (("head", head, HEADS), ("style", style, STYLES)):
            if name not in known:
                raise UserError(f"{what}={name!r} is not known: choose one of {', '.join(known)}.")
        names = [item.name for item in fields(Settings)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}."
                raise UserError(f"A detector has no option {name!r}: {hint}")
        settings = Settings(**options)
        retina = head == "retinanet"
        if retina:
            backbone.use_maps([i for i, info in enumerate(backbone.feature_info) if info["reduction"] >= RETINA_STRIDE])
        self.neck = build_neck(backbone, settings.channels, STYLES[style].neck_norm, retina)
        self.head = (
            one_stage(self.neck.strides, num_classes, settings)
            if retina
            else two_stage(self.neck.strides, num_classes, head, STYLES[style], settings)
        )
        leave_inputs_alone(self)

    @classmethod
    def dense_backbone(cls, name: str, args: dict[str, Any], options: dict[str, Any]) -> Backbone:
        finest = RETINA_STRIDE if options.get("head") == "retinanet" else 4
        own = entries()[resolve_name(name)].family.model.detector_args(finest)
        model: Any = create_model(resolve_name(name), **{**own, **args})
        return model

    def init_scaled(self) -> None:
        """As for every model, but neck and heads keep their initial weights, which predict anchors and proposals."""
        init_scaled(self.backbone)

    def no_weight_decay(self) -> set[str]:
        """Return names as for a classifier, and relative position tables, which only published classifiers decay.

        These are the tables of MViTv2 and of DAT's neighbourhood attention.
        """
        names = (name for name, _ in self.backbone.named_parameters(prefix="backbone"))
        return super().no_weight_decay() | {name for name in names if TABLE.search(name)}

    def forward(self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> list[Objects]:
        """Return the detections in each image.

        Args:
            images: (B, C, H, W).
            sizes: true (height, width) of each image, if they are padded.

        Returns:
            For each image "boxes" (n, 4) as x1, y1, x2, y2 in pixels, "labels" (n,) starting at 0 and descending
            "scores" (n,). A mask head adds "masks", probabilities (n, 1, 28, 28) inside the boxes (see `paste_masks`);
            a keypoint head adds "keypoints" (n, K, 3) as x, y, 1 and "keypoint_scores" (n, K).

        Raises:
            UserError: in training mode.
        """
        if self.training:
            raise UserError("A detector in training mode returns losses, not detections: call eval() first.")
        full = (images.shape[-2], images.shape[-1])
        sizes = [full] * len(images) if sizes is None else sizes
        places: dict[tuple[int, ...], list[int]] = {}
        for place, size in enumerate(sizes):
            own = (min(-(-side // DIVISOR) * DIVISOR, most) for side, most in zip(size, full, strict=True))
            places.setdefault(tuple(own), []).append(place)
        found: list[Objects] = [{}] * len(images)
        for (height, width), group in places.items():
            part = images if len(places) == 1 else images[group]
            part = part[..., :height, :width]
            listed = ImageList(part, [sizes[place] for place in group])
            for place, objects in zip(group, self.head(listed, self.neck(self.backbone(part)))[0], strict=True):
                found[place] = objects
        return found

    def forward_train(self, view: DetectionView, targets: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return the losses to be summed, by name, and with "gap" in `targets` also the mean of the last map.

        Images may have no objects. Boxes must have a positive width and height. Raises UserError if the objects lack
        the masks or keypoints that the head needs.
        """
        images, sizes, objects = view
        for part in ("mask", "keypoint"):
            if part in self.options["head"] and not all(f"{part}s" in found for found in objects):
                raise UserError(f"{self.options['head']} needs {part}s, but the data have none: choose another head.")
        assert all((found["boxes"][:, 2:] > found["boxes"][:, :2]).all() for found in objects)
        maps = self.backbone(images)
        _, losses = self.head(ImageList(images, list(sizes)), self.neck(maps), objects)
        if "gap" in targets:
            losses["gap"] = maps[-1].mean((2, 3))
        return losses


def build_neck(backbone: Backbone, channels: int, norm: str, retina: bool) -> FeaturePyramid | SimplePyramid:
    """Build a neck with five levels.

    They start at stride 4, or at 8 for RetinaNet and for backbones without a finer map (UViT, whose paper does not say
    how its map enters the detector). Levels that the backbone lacks are computed by convolutions from its last map or,
    for plain models, from the pyramid's last level. In two-stage detectors that lack only the last level, it is
    obtained by subsampling.
    """
    form = backbone.detector
    if form.levels == "simple":
        extra = CoarseLevels(channels, channels, 2, from_pyramid=True) if retina else LastLevelMaxPool()
        stride = backbone.feature_info[-1]["reduction"]
        return SimplePyramid(backbone.embed_dim, stride, 1 if retina else 2, channels, extra)
    maps = backbone.feature_info[-1:] if form.levels == "last" else backbone.feature_info
    maps = [info for info in maps if info["reduction"] >= RETINA_STRIDE or not retina]
    widths = [info["num_chs"] for info in maps]
    more, from_pyramid = LEVELS - len(maps), form.coarse == "pyramid"
    extra = LastLevelMaxPool()
    if retina or more > 1:
        extra = CoarseLevels(channels if from_pyramid else widths[-1], channels, more, from_pyramid)
    return FeaturePyramid(widths, maps[0]["reduction"], channels, norm, extra)


def one_stage(strides: Sequence[float], num_classes: int, settings: Settings) -> OneStage:
    """Build RetinaNet's head, with nine anchors at every position."""
    scale = settings.anchor_scale or 4.0
    anchors = Anchors(strides, [scale * 2 ** (third / 3) for third in range(3)])
    head = FocalHead(settings.channels, 9, num_classes)
    return OneStage(anchors, head, settings.score_threshold, settings.nms_threshold, settings.detections)


def two_stage(strides: Sequence[float], num_classes: int, head: str, style: Style, settings: Settings) -> TwoStage:
    """Build a two-stage head: proposals with three anchors at every position, then one or three box stages."""
    channels = settings.channels
    rpn = Proposals(
        Anchors(strides, (settings.anchor_scale or 8.0,)),
        ProposalHead(channels, 3, style.rpn_convs),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=settings.rpn_batch,
        positive_fraction=0.5,
        pre_nms_top_n=dict(zip(("training", "testing"), settings.rpn_pre_nms, strict=True)),
        post_nms_top_n={"training": settings.rpn_post_nms, "testing": settings.rpn_post_nms},
        nms_thresh=0.7,
        score_thresh=torch.finfo(torch.float32).tiny,
    )
    cascade = head.startswith("cascade")
    swin = cascade and style.cascade == "swin"
    box = style.cascade_box if cascade else style.box
    stages = []
    for i, iou in enumerate(IOUS if cascade else IOUS[:1]):
        last = not cascade or i == len(IOUS) - 1
        parts: dict[str, Any] = {
            "box_roi_pool": RegionPool(strides[:-1], 7),
            "box_head": FastRCNNConvFCHead(
                (channels, 7, 7),
                [channels] * box.convs,
                [settings.hidden] * (1 if box.convs else 2),
                NORMS[box.norm],
            ),
            "box_predictor": BoxPredictor(settings.hidden, num_classes, not cascade or swin),
        }
        if "mask" in head and (swin or last):
            parts["mask_roi_pool"] = RegionPool(strides[:-1], 14)
            parts["mask_head"] = MaskRCNNHeads(channels, [channels] * 4, 1, NORMS[style.mask_norm])
            parts["mask_predictor"] = MaskRCNNPredictor(channels, channels, num_classes)
        if "keypoint" in head:
            parts["keypoint_roi_pool"] = RegionPool(strides[:-1], 14)
            parts["keypoint_head"] = KeypointRCNNHeads(channels, [2 * channels] * 8)
            parts["keypoint_predictor"] = KeypointRCNNPredictor(2 * channels, settings.num_keypoints)
        stages.append(
            Stage(
                iou,
                sharpness=i + 1.0,
                giou=swin,
                batch=settings.box_batch,
                score_thresh=settings.score_threshold,
                nms_thresh=settings.nms_threshold,
                detections_per_img=settings.detections,
                **parts,
            )
        )
    return TwoStage(rpn, Cascade(stages, "logits" if swin else "probabilities"))


class Found(NamedTuple):
    """The outputs of a detector for a batch."""

    objects: list[Objects]
    """Detections in each image, in pixels of the image that the network saw."""
    seen: list[tuple[int, int]]
    """(height, width) of each of these images without padding."""
    finite: list[Tensor]
    """Whether the output of each layer of the head is finite."""


class DetectionObjective(Objective):
    """The sum of the losses of the head."""

    def __call__(self, outputs: dict[str, Tensor], target: Any, view: DetectionView) -> Tensor:
        return torch.stack([loss for name, loss in outputs.items() if name != "gap"]).sum()


def at_full_size(objects: Objects, seen: tuple[int, int], full: tuple[int, int]) -> Objects:
    """Convert detections in an image seen at size `seen` to pixels of the original image of size `full`.

    Boxes and keypoints are scaled; masks become bool masks (n, H, W) of the whole image.
    """
    scale = objects["boxes"].new_tensor([full[1] / seen[1], full[0] / seen[0]]).float()
    out = {**objects, "boxes": objects["boxes"].float() * scale.repeat(2)}
    if "masks" in objects:
        out["masks"] = paste_masks(objects["masks"], out["boxes"], full)
    if "keypoints" in objects:
        points = objects["keypoints"].float()
        out["keypoints"] = torch.cat([points[..., :2] * scale, points[..., 2:]], dim=-1)
    return out


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Convert mask probabilities (n, 1, m, m) inside `boxes` (n, 4) to bool masks (n, height, width) of an image.

    `boxes` are in pixels of an image of `size`; for masks of the original image, scale the boxes to it first. The
    probabilities are interpolated bilinearly between the centres of the mask's cells and are zero outside.
    """
    out = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    for pasted, mask, (x1, y1, x2, y2) in zip(out, masks, boxes.tolist(), strict=True):
        left, top = max(int(x1), 0), max(int(y1), 0)
        right, bottom = min(int(x2) + 1, size[1]), min(int(y2) + 1, size[0])
        if left >= right or top >= bottom or x2 <= x1 or y2 <= y1:
            continue
        x = (torch.arange(left, right, device=masks.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y = (torch.arange(top, bottom, device=masks.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        part = F.grid_sample(mask[None].float(), grid[None], align_corners=False)[0, 0]
        pasted[top:bottom, left:right] = part >= threshold
    return out
