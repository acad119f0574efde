"""The training loss of classification: cross-entropy, optionally with distillation from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from anyres.data import Source
from anyres.data.classes import read_names
from anyres.data.config import DataConfig
from anyres.errors import UserError
from anyres.io import hub
from anyres.models._checkpoints import load_checkpoint
from anyres.models._folders import model_of_folder
from anyres.models._registry import create_model
from anyres.tasks.classification.options import TrainConfig
from anyres.tasks.classification.sparsification import sparsification_losses
from anyres.tasks.labels import LabelObjective
from anyres.tasks.losses import distilled_loss, soft_cross_entropy
from anyres.tasks.objective import Outputs
from anyres.tasks.weights import for_other_classes, weights_file

Loss = Callable[[Outputs, Tensor, Tensor], Tensor]


class ClassificationObjective(LabelObjective):
    """Mixup and label smoothing, with the loss that the options select."""

    def __init__(self, options: TrainConfig, source: Source, accelerator: Accelerator) -> None:
        super().__init__(options, source)
        self.loss = build_base_loss(options, accelerator, source)

    def __call__(self, outputs: Outputs, target: Tensor, view: Tensor) -> Tensor:
        return self.loss(outputs, target, view)


def build_classifier(options: TrainConfig, source: Source) -> Any:
    arguments = {
        "num_classes": len(source.label_names),
        "in_chans": source.in_chans,
        "img_size": options.shapes[0],
        "drop_path_rate": options.drop_path,
        **options.model_args,
    }
    return create_model(options.model, **arguments)


def build_base_loss(options: TrainConfig, accelerator: Accelerator, source: Source) -> Loss:
    """Return the loss: cross-entropy with soft labels or, with a teacher, DeiT's distillation on the same mixed views.

    Raises UserError if the teacher cannot be loaded or does not fit the classes.
    """
    if options.sparsify:
        return build_sparsification_loss(options, accelerator, source)
    if options.teacher is None:
        return lambda outputs, target, view: soft_cross_entropy(outputs["logits"], target)
    teacher, places = load_teacher(options, source)
    teacher, places = teacher.to(accelerator.device), places.to(accelerator.device)

    def base_loss(outputs: Outputs, target: Tensor, view: Tensor) -> Tensor:
        with torch.no_grad(), accelerator.autocast():
            teacher_logits = teacher(view)[:, places]
        # Without a distillation token, a model learns from the teacher with its only head (an ablation in the paper).
        return distilled_loss(
            soft_cross_entropy(outputs["logits"], target),
            outputs.get("dist_logits", outputs["logits"]),
            teacher_logits,
            options.teacher_kind,
            options.teacher_alpha,
            options.teacher_tau,
        )

    return base_loss


def build_sparsification_loss(options: TrainConfig, accelerator: Accelerator, source: Source) -> Loss:
    """Return DynamicViT's loss; the teacher is the unpruned model and sees the same mixed views.

    Raises UserError if the model cannot be pruned or the teacher's weights do not fit.
    """
    weights = options.teacher_weights or options.init_from
    if weights is None:
        raise UserError("sparsify needs a trained unpruned model to start from; set init_from to its weights")
    ratios = getattr(build_classifier(options, source), "keep_ratios", ())
    if not ratios:
        raise UserError(
            f"sparsify needs a model with score predictors, such as dynamicvit_deit_small; not {options.model}"
        )
    unpruned = options.changed(model_args={**options.model_args, "prune_before": ()}, drop_path=0.0)
    teacher = build_classifier(unpruned, source).to(accelerator.device)
    path = weights_file(weights)
    if for_other_classes(path, source.label_names):
        raise UserError(f"the weights of sparsify's teacher, {path}, are for other classes: give those for this data")
    report = load_checkpoint(teacher, path, strict=False)
    if report.missing or report.mismatched:
        raise UserError(f"the weights of sparsify's teacher do not fit {options.model}: {report}")
    teacher.eval().requires_grad_(False)

    def base_loss(outputs: Outputs, target: Tensor, view: Tensor) -> Tensor:
        with torch.no_grad(), accelerator.autocast():
            known = teacher.forward_train(view)
        classification = soft_cross_entropy(outputs["logits"], target)
        return sparsification_losses(classification, outputs, known, ratios, options.sparsify)[-1]

    return base_loss


def load_teacher(options: TrainConfig, source: Source) -> tuple[nn.Module, Tensor]:
    """Load the teacher, a timm model or a run's weights folder, and the index of its output for each source class.

    Raises UserError if it cannot be loaded (including network errors) or does not have the classes of the source.
    """
    name, weights = str(options.teacher), options.teacher_weights
    arguments: dict[str, Any] = {"in_chans": source.in_chans}
    names = read_names(options.teacher_names) if options.teacher_names else None
    if weights is not None:  # timm's own weights include the head; with a checkpoint, its size has to be set
        arguments["num_classes"] = len(names or source.label_names)
    if Path(name).is_dir():
        teacher: Any = model_of_folder(*hub.read_folder(name))
    else:
        try:
            teacher = timm.create_model(name, pretrained=weights is None, checkpoint_path=weights or "", **arguments)
        except Exception as error:  # timm and the hub raise many types of errors, including network errors
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"teacher {name!r} cannot be loaded ({reason}); give a timm name if there is internet access, "
                "its checkpoint as teacher_weights, or the weights folder of a run"
            ) from error
    if names is not None:
        teacher.pretrained_cfg = {**teacher.pretrained_cfg, "label_names": names}
    fix = "Choose a teacher for these classes, or give its class names in a file with teacher_names=FILE"
    places = DataConfig.of(teacher).places(source, fix)
    return cast(nn.Module, teacher.eval().requires_grad_(False)), places
