"""The training loss of DynamicViT (Rao et al., NeurIPS 2021, section 3.4; TPAMI 2023, section 3.4).

It is the sum of the classification loss, the distance of the sampled keep ratios from their targets, and class and
token distillation from the unpruned host that the run started from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anyres.tasks.objective import Outputs


def ratio_loss(decisions: Tensor, ratios: Sequence[float]) -> Tensor:
    """Return the squared error of the keep ratios, averaged over images and summed over predictors.

    Args:
        decisions: keep masks (B, predictors, N).
        ratios: target keep ratio after each predictor.
    """
    share = decisions.mean(dim=-1)
    return (share - share.new_tensor(ratios)).square().mean(dim=0).sum()


def class_distillation(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)) of logits (B, K), averaged over the batch."""
    student, teacher = logits.float().log_softmax(dim=-1), teacher_logits.float().log_softmax(dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def token_distillation(outputs: Outputs, teacher: Outputs) -> Tensor:
    """Return the distance of the kept tokens from the teacher's, in the form that suits the model's outputs.

    "map" (ConvNeXt, Swin): mean squared error of the whole normalised last feature map. "aux_logits" (LV-ViT): KL
    divergence of the auxiliary logits, averaged over the patches that the last predictor kept. "tokens" (DeiT): mean
    squared error of these patches. The last two are zero if no patch is kept.
    """
    if "map" in outputs:
        return F.mse_loss(outputs["map"], teacher["map"])
    keep = outputs["decisions"][:, -1].detach()
    if "aux_logits" in outputs:
        student, target = (out["aux_logits"].float().log_softmax(dim=-1) for out in (outputs, teacher))
        distance = (target.exp() * (target - student)).sum(dim=-1)
    else:
        distance = (outputs["tokens"] - teacher["tokens"]).float().square().mean(dim=-1)
    return (distance * keep).sum() / keep.sum().clamp(min=1)


def sparsification_losses(
    base: Tensor,
    outputs: Outputs,
    teacher: Outputs,
    ratios: Sequence[float],
    ratio_weight: float,
    distillation_weight: float = 0.5,
) -> Tensor:
    """Return the classification, ratio, class distillation and token distillation losses and their weighted total.

    Args:
        base: the classification loss.
        outputs: outputs of the student's `forward_train` in training mode.
        teacher: outputs of its unpruned host in eval mode, without gradients.
        ratios: `keep_ratios` of the student.
        ratio_weight: published as 2 (LV-ViT, DeiT-S), 5 (DeiT-B), 10 (ConvNeXt, Swin); the sum over the predictors is
            divided by their number.
        distillation_weight: weight of each of the two distillation terms.

    Returns:
        (5,)
    """
    ratio = ratio_loss(outputs["decisions"], ratios)
    classes = class_distillation(outputs["logits"], teacher["logits"])
    tokens = token_distillation(outputs, teacher)
    total = base + ratio_weight * ratio / len(ratios) + distillation_weight * (classes + tokens)
    return torch.stack([base, ratio, classes, tokens, total])
