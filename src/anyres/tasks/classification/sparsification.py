"""What a DynamicViT learns from: labels, the shares of tokens it should keep, and its own unpruned host.

Loss of Rao et al. (NeurIPS 2021, section 3.4; TPAMI 2023, section 3.4): classification, plus the distance of the
sampled decisions from the target shares, plus class and token distillation from the host that the run started from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anyres.tasks.objective import Outputs


def ratio_loss(decisions: Tensor, ratios: Sequence[float]) -> Tensor:
    """Squared distance of the kept share of every image from its target, summed over the predictors.

    Args:
        decisions: keep masks (B, predictors, N).
        ratios: target share after each predictor.
    """
    share = decisions.mean(dim=-1)
    return (share - share.new_tensor(ratios)).square().mean(dim=0).sum()


def class_distillation(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) of logits (B, K), mean over the batch."""
    student, teacher = logits.float().log_softmax(dim=-1), teacher_logits.float().log_softmax(dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def token_distillation(outputs: Outputs, teacher: Outputs) -> Tensor:
    """How far the tokens that count are from the teacher's; three forms, told apart by what the model returns.

    "map" (ConvNeXt, Swin): mean squared error of the whole normed last map. "aux_logits" (LV-ViT): KL divergence of the
    auxiliary logits, mean over the patches kept last. "tokens" (DeiT): mean squared error of these patches. Zero if
    none is kept.
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
    """(5,): classification, ratio, class distillation, token distillation, and their weighted total.

    Args:
        base: the classification loss.
        outputs: what the student's `forward_train` returned in training.
        teacher: the same of its unpruned host in evaluation, without gradients.
        ratios: `keep_ratios` of the student.
        ratio_weight: published as 2 (LV-ViT, DeiT-S), 5 (DeiT-B), 10 (ConvNeXt, Swin); the sum over the predictors is
            divided by their number.
        distillation_weight: of each of the two distillation terms.
    """
    ratio = ratio_loss(outputs["decisions"], ratios)
    classes = class_distillation(outputs["logits"], teacher["logits"])
    tokens = token_distillation(outputs, teacher)
    total = base + ratio_weight * ratio / len(ratios) + distillation_weight * (classes + tokens)
    return torch.stack([base, ratio, classes, tokens, total])
