"""The training loss: the loss of the task plus scale consistency between replicas.

ResFormer (Tian et al., CVPR 2023, section 3.2) processes every image at several sizes in one step. These replicas are
visited from large to small. Each one after the first is also trained to agree with the next larger one, which acts as
its teacher and receives no gradient. The loss of a step is the mean over the replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyres.tasks.objective import Outputs

CONSISTENCY_KINDS = ("smooth-l1", "l2", "cosine", "kl")

Forward = Callable[[Any, tuple[str, ...]], Outputs]
BaseLoss = Callable[[Outputs, Any, Any], Tensor]
"""(outputs of `forward_train`, target, view) → scalar: a task's `Objective`."""


def scale_consistency(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Return the distance of a replica's vector (B, D) from that of the next larger replica (B, D), a scalar.

    smooth-l1  mean smooth-L1 (threshold 1) against the teacher, whitened over D by a LayerNorm without affine
               parameters (eps 1e-6); the student is not whitened (as published; the default)
    l2         mean squared error without whitening
    cosine     1 - mean cosine similarity
    kl         KL(softmax(teacher) || softmax(student)), summed over D, averaged over B, temperature 1; for logits
    """
    student, teacher = student.float(), teacher.detach().float()
    if kind == "smooth-l1":
        return F.smooth_l1_loss(student, F.layer_norm(teacher, teacher.shape[-1:], eps=1e-6))
    if kind == "l2":
        return F.mse_loss(student, teacher)
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()
    if kind == "kl":
        log_student, log_teacher = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
        return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    raise ValueError(f"scale consistency {kind!r} is unknown; choose one of {', '.join(CONSISTENCY_KINDS)}")


def backward_replicas(
    forward: Forward,
    views: Sequence[Any],
    targets: Sequence[Any],
    base_loss: BaseLoss,
    *,
    kind: str = "none",
    target: str = "cls",
    alpha: float = 1.0,
    share: float = 1.0,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    synchronise: bool = True,
    before_last: Callable[[list[Tensor]], None] | None = None,
) -> list[Tensor]:
    """Backpropagate `share` times the mean of the replicas' losses, each as soon as it is computed.

    The teacher is detached, so the replicas share no graph. Their gradients add up to those of a joint backward pass,
    but only one replica's activations are alive at a time.

    Args:
        forward: (view, names of vectors) -> dict with "logits" and those vectors, like a model's `forward_train`.
        views: the replicas from large to small; for images, (B, C, H_i, W_i) each.
        targets: one per replica; for classification, soft labels (B, K).
        base_loss: (outputs, target, view) -> scalar.
        kind: "none" or one of CONSISTENCY_KINDS.
        target: the vector to compare: "cls" (the input of the head), "gap" (mean patch token) or "logit".
        alpha: weight of the consistency term.
        share: factor on the gradients, 1 / number of gradient accumulation steps.
        backward: function that runs the backward pass, for example that of a gradient scaler.
        no_sync: context in which DDP or FSDP2 does not synchronise gradients.
        synchronise: synchronise gradients in the last replica's backward pass, when they are complete.
        before_last: called with all losses before the last backward pass starts, while a GPU still has work queued.

    Returns:
        The detached losses, in the order of `views`.
    """
    chain = _chain(forward, views, targets, base_loss, kind, target, alpha)
    losses: list[Tensor] = []
    for index in range(len(views)):
        last = index == len(views) - 1
        # The forward pass has to be in the context: DDP decides there whether the next backward pass synchronises.
        with nullcontext() if last and synchronise else no_sync():
            loss = next(chain)
            losses.append(loss.detach())
            if last and before_last is not None:
                before_last(losses)
            backward(loss * (share / len(views)))
    return losses


def _chain(
    forward: Forward,
    views: Sequence[Any],
    targets: Sequence[Any],
    base_loss: BaseLoss,
    kind: str,
    target: str,
    alpha: float,
) -> Iterator[Tensor]:
    wanted = (target,) if kind != "none" and len(views) > 1 and target != "logit" else ()
    teacher = None
    for view, soft_labels in zip(views, targets, strict=True):
        outputs = forward(view, wanted)
        loss = base_loss(outputs, soft_labels, view)
        if kind != "none":
            if teacher is not None:
                loss = loss + alpha * scale_consistency(_vector(outputs, target), teacher, kind)
            if len(views) > 1:
                teacher = _vector(outputs, target).detach()
        yield loss


def _vector(outputs: Outputs, target: str) -> Tensor:
    return outputs["logits" if target == "logit" else target]
