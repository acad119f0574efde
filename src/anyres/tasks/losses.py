"""Losses of classifiers: soft labels, and distillation from a teacher.

DeiT (Touvron et al., ICML 2021, section 4) learns from the labels of a convolutional teacher through a second head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, K) against probabilities (B, K), as mixup and label smoothing produce them."""
    return F.cross_entropy(logits.float(), target)


def distilled_loss(
    base: Tensor, dist_logits: Tensor, teacher_logits: Tensor, kind: str, alpha: float = 0.5, tau: float = 1.0
) -> Tensor:
    """DeiT's (1 - alpha) * base + alpha * distillation on the distillation head's logits (B, K).

    hard  cross-entropy against the teacher's arg-max, without smoothing
    soft  tau^2 * KL(softmax(teacher / tau) || softmax(dist / tau)) divided by the number of *elements* B*K. That is the
          published division; the textbook one is by B, so alpha and tau mean K times less here.
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
