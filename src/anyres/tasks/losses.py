"""Losses of classifiers: cross-entropy with soft labels, and distillation from a teacher.

DeiT (Touvron et al., ICML 2021, section 4) learns from the predictions of a convolutional teacher with a second head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (B, K) and probabilities (B, K), as from mixup and label smoothing."""
    return F.cross_entropy(logits.float(), target)


def distilled_loss(
    base: Tensor, dist_logits: Tensor, teacher_logits: Tensor, kind: str, alpha: float = 0.5, tau: float = 1.0
) -> Tensor:
    """Return DeiT's (1 - alpha) * base + alpha * distillation, for the distillation head's logits (B, K).

    hard  cross-entropy against the teacher's argmax, without label smoothing
    soft  tau^2 * KL(softmax(teacher / tau) || softmax(dist / tau)) divided by the number of *elements* B*K, as
          published. The usual definition divides by B, so this term is K times smaller than usual.
    """
    dist_logits, teacher_logits = dist_logits.float(), teacher_logits.detach().float()
    if kind == "hard":
        distillation = F.cross_entropy(dist_logits, teacher_logits.argmax(dim=-1))
    elif kind == "soft":
        log_student, log_teacher = (dist_logits / tau).log_softmax(dim=-1), (teacher_logits / tau).log_softmax(dim=-1)
        total = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        distillation = total * tau**2 / dist_logits.numel()
    else:
        raise ValueError(f"distillation kind {kind!r} is unknown; choose hard or soft")
    return (1 - alpha) * base + alpha * distillation
