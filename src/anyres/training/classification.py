"""Classification of images: labels mixed and smoothed, a teacher's if there is one, top-1."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from anyres.data import Augmentation, ImageViews, Mixing, Source, open_source
from anyres.data.classes import read_names
from anyres.data.schedule import Size
from anyres.errors import UserError
from anyres.evaluation.accuracy import evaluate
from anyres.inference.preparation import label_places
from anyres.models._checkpoints import load_checkpoint
from anyres.models._registry import create_model
from anyres.tasks import load_pretrained
from anyres.training.config import LabelConfig, TrainConfig
from anyres.training.losses import BaseLoss, Outputs, distilled_loss, soft_cross_entropy
from anyres.training.sparsification import sparsification_losses
from anyres.training.task import Task, for_other_classes, weights_file


class Classification(Task):
    """A classifier of images."""

    config: TrainConfig
    score = "acc1"

    def open_source(self, split: str, like: Source | None = None) -> Source:
        config = self.config
        if like is None:
            return open_source(config.data, split)
        data, whole = self.validation_data()
        return open_source(data, split, in_chans=like.in_chans, label_names=like.label_names, whole=whole)

    def build_model(self, source: Source) -> Any:
        return build_classifier(self.config, source)

    def views(self, source: Source) -> ImageViews:
        return ImageViews(augmentation(self.config), source.mean, source.std)

    def build_loss(self, source: Source, accelerator: Accelerator) -> BaseLoss:
        self.mixing = mixing(self.config, source)
        return build_base_loss(self.config, accelerator, source)

    def mix(
        self, views: list[Tensor], targets: list[Tensor], epoch: int, step: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        return self.mixing(views, targets[0], epoch, step)

    def evaluate(
        self, model: Any, source: Source, size: Size, device: torch.device, precision: str
    ) -> dict[str, float]:
        measured = evaluate(model, source, size, self.config.eval_batch_size, device, precision)
        return {"acc1": measured.scores["top1"], "val_loss": measured.scores["loss"]}

    def facts(self, source: Source) -> dict[str, Any]:
        return {"crop_pct": self.config.crop_pct or source.crop_pct, "interpolation": self.config.interpolation}


def augmentation(config: LabelConfig) -> Augmentation:
    """How training views of labelled images or clips are made."""
    return Augmentation(
        scale=(config.crop_scale[0], config.crop_scale[1]),
        ratio=(config.crop_ratio[0], config.crop_ratio[1]),
        hflip=config.hflip,
        auto_augment=config.auto_augment,
        color_jitter=config.color_jitter,
        erasing=config.erasing,
        interpolation=config.interpolation,
        separate=config.separate_aug,
    )


def mixing(config: LabelConfig, source: Any) -> Mixing:
    """Mixup, CutMix and label smoothing of labelled images or clips."""
    return Mixing(
        num_classes=len(source.label_names),
        mixup=config.mixup,
        cutmix=config.cutmix,
        prob=config.mix_prob,
        switch_prob=config.switch_prob,
        label_smoothing=config.smoothing,
        separate=config.separate_mix,
        seed=config.seed,
    )


def build_classifier(config: TrainConfig, source: Source) -> Any:
    options = {
        "num_classes": len(source.label_names),
        "in_chans": source.in_chans,
        "img_size": config.shapes[0],
        "drop_path_rate": config.drop_path,
        **config.model_args,
    }
    return create_model(config.model, **options)


def build_base_loss(config: TrainConfig, accelerator: Accelerator, source: Source) -> BaseLoss:
    """Cross-entropy with the soft labels; with a teacher, DeiT's distillation: it sees the same mixed view."""
    if config.sparsify:
        return build_sparsification_loss(config, accelerator, source)
    if config.teacher is None:
        return lambda outputs, target, view: soft_cross_entropy(outputs["logits"], target)
    teacher, places = load_teacher(config, source)
    teacher, places = teacher.to(accelerator.device), places.to(accelerator.device)

    def base_loss(outputs: Outputs, target: Tensor, view: Tensor) -> Tensor:
        with torch.no_grad(), accelerator.autocast():
            teacher_logits = teacher(view)[:, places]
        # A model without a distillation token learns from the teacher through its only head (an ablation of the paper).
        return distilled_loss(
            soft_cross_entropy(outputs["logits"], target),
            outputs.get("dist_logits", outputs["logits"]),
            teacher_logits,
            config.teacher_kind,
            config.teacher_alpha,
            config.teacher_tau,
        )

    return base_loss


def build_sparsification_loss(config: TrainConfig, accelerator: Accelerator, source: Source) -> BaseLoss:
    """DynamicViT's loss; the teacher is the model without its predictors and sees the same mixed view."""
    weights = config.teacher_weights or config.init_from
    if weights is None:
        raise UserError("sparsify starts from a trained unpruned model; set init_from to its weights")
    ratios = getattr(build_classifier(config, source), "keep_ratios", ())
    if not ratios:
        raise UserError(
            f"sparsify needs a model with score predictors, such as dynamicvit_deit_small; not {config.model}"
        )
    unpruned = config.changed(model_args={**config.model_args, "prune_before": ()}, drop_path=0.0)
    teacher = build_classifier(unpruned, source).to(accelerator.device)
    path = weights_file(weights)
    if for_other_classes(path, source.label_names):
        raise UserError(f"the weights of sparsify's teacher, {path}, are for other classes: give those for this data")
    report = load_checkpoint(teacher, path, strict=False)
    if report.missing or report.mismatched:
        raise UserError(f"the weights of sparsify's teacher do not fit {config.model}: {report}")
    teacher.eval().requires_grad_(False)

    def base_loss(outputs: Outputs, target: Tensor, view: Tensor) -> Tensor:
        with torch.no_grad(), accelerator.autocast():
            known = teacher.forward_train(view)
        classification = soft_cross_entropy(outputs["logits"], target)
        return sparsification_losses(classification, outputs, known, ratios, config.sparsify)[-1]

    return base_loss


def load_teacher(config: TrainConfig, source: Source) -> tuple[nn.Module, Tensor]:
    """A timm network, or the weights folder of a run, and which of its outputs means each class of the source. Errors:
    UserError in one sentence, also without network."""
    name, weights = str(config.teacher), config.teacher_weights
    options: dict[str, Any] = {"in_chans": source.in_chans}
    names = read_names(config.teacher_names) if config.teacher_names else None
    if weights is not None:  # timm's own have a head; that of a checkpoint is as large as its classes
        options["num_classes"] = len(names or source.label_names)
    if Path(name).is_dir():
        teacher: Any = load_pretrained(name)
    else:
        try:
            teacher = timm.create_model(name, pretrained=weights is None, checkpoint_path=weights or "", **options)
        except Exception as error:  # timm and the hub raise what they like, down to network errors
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"teacher {name!r} cannot be loaded ({reason}); give a timm name where there is internet access, "
                "its checkpoint as teacher_weights, or the weights folder of a run"
            ) from error
    if names is not None:
        teacher.pretrained_cfg = {**teacher.pretrained_cfg, "label_names": names}
    fix = "Choose a teacher for these classes, or give its own in a file with teacher_names=FILE"
    places = label_places(teacher, source, fix)
    return cast(nn.Module, teacher.eval().requires_grad_(False)), places
