"""Losses against NumPy, gradients of the replica-wise backward against the joint one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anyres.models._registry import create_model
from anyres.models.resformer import ResFormer
from anyres.tasks.losses import distilled_loss, soft_cross_entropy
from anyres.training.losses import backward_replicas, scale_consistency
from tests.typed import as_a


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture
def vectors() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return 2 * rng.standard_normal((5, 7)), 3 * rng.standard_normal((5, 7)) + 1


def consistency(student: np.ndarray, teacher: np.ndarray, kind: str) -> float:
    if kind == "smooth-l1":
        white = (teacher - teacher.mean(-1, keepdims=True)) / np.sqrt(teacher.var(-1, keepdims=True) + 1e-6)
        distance = np.abs(student - white)
        return float(np.where(distance < 1, distance**2 / 2, distance - 0.5).mean())
    if kind == "l2":
        return float(((student - teacher) ** 2).mean())
    if kind == "cosine":
        norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
        return float(1 - ((student * teacher).sum(-1) / norms).mean())
    probability = np.exp(log_softmax(teacher))
    return float((probability * (log_softmax(teacher) - log_softmax(student))).sum(-1).mean())


@pytest.mark.parametrize("kind", ["smooth-l1", "l2", "cosine", "kl"])
def test_scale_consistency_is_the_formula(vectors: tuple[np.ndarray, np.ndarray], kind: str) -> None:
    student, teacher = vectors
    value = scale_consistency(torch.tensor(student), torch.tensor(teacher), kind)
    assert float(value) == pytest.approx(consistency(student, teacher, kind), rel=1e-5)


@pytest.mark.parametrize("kind", ["smooth-l1", "l2", "cosine", "kl"])
def test_the_teacher_gets_no_gradient(vectors: tuple[np.ndarray, np.ndarray], kind: str) -> None:
    student, teacher = (torch.tensor(vector, requires_grad=True) for vector in vectors)
    scale_consistency(student, teacher, kind).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="smooth-l1, l2, cosine, kl"):
        scale_consistency(torch.zeros(1, 2), torch.zeros(1, 2), "l1")
    with pytest.raises(ValueError, match="hard or soft"):
        distilled_loss(torch.zeros(()), torch.zeros(1, 2), torch.zeros(1, 2), "medium")


def test_distillation_is_the_formula(vectors: tuple[np.ndarray, np.ndarray]) -> None:
    student, teacher = vectors
    base, tau = torch.tensor(1.7), 3.0
    arguments = (base, torch.tensor(student), torch.tensor(teacher))
    hard = -log_softmax(student)[np.arange(5), teacher.argmax(-1)].mean()
    assert float(distilled_loss(*arguments, "hard", 0.3)) == pytest.approx(0.7 * 1.7 + 0.3 * hard, rel=1e-5)
    log_student, log_teacher = log_softmax(student / tau), log_softmax(teacher / tau)
    soft = tau**2 * (np.exp(log_teacher) * (log_teacher - log_student)).sum() / (5 * 7)
    assert float(distilled_loss(*arguments, "soft", 0.1, tau)) == pytest.approx(0.9 * 1.7 + 0.1 * soft, rel=1e-5)


def test_soft_cross_entropy_is_the_formula(vectors: tuple[np.ndarray, np.ndarray]) -> None:
    logits, other = vectors
    target = np.exp(log_softmax(other))
    expected = -(target * log_softmax(logits)).sum(-1).mean()
    assert float(soft_cross_entropy(torch.tensor(logits), torch.tensor(target).float())) == pytest.approx(expected)


def base_loss(outputs: dict[str, Tensor], target: Tensor, _view: Tensor) -> Tensor:
    return soft_cross_entropy(outputs["logits"], target)


@pytest.mark.parametrize(
    ("kind", "target"), [("smooth-l1", "cls"), ("l2", "gap"), ("cosine", "logit"), ("kl", "logit"), ("none", "cls")]
)
def test_the_chain_goes_from_each_replica_to_the_next_larger_one(kind: str, target: str) -> None:
    rng = np.random.default_rng(1)
    recorded = [{"logits": rng.standard_normal((3, 4)), "cls": rng.standard_normal((3, 6))} for _ in range(3)]
    for record in recorded:
        record["gap"] = record["cls"] * 2 + 1
    soft = np.full((3, 4), 0.25)

    def forward(view: Tensor, wanted: tuple[str, ...]) -> dict[str, Tensor]:
        record = recorded[int(view)]
        return {name: torch.tensor(record[name]) for name in ("logits", *wanted)}

    views = [torch.tensor(index) for index in range(3)]
    options: Any = {"kind": kind, "target": target, "alpha": 0.5}
    losses = backward_replicas(
        forward, views, [torch.tensor(soft).float()] * 3, base_loss, backward=lambda loss: None, **options
    )
    name = {"logit": "logits"}.get(target, target)
    for index, loss in enumerate(losses):
        expected = -(soft * log_softmax(recorded[index]["logits"])).sum(-1).mean()
        if index > 0 and kind != "none":
            expected += 0.5 * consistency(recorded[index][name], recorded[index - 1][name], kind)
        assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def network() -> ResFormer:
    torch.manual_seed(0)
    size: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
    return as_a(ResFormer, create_model("resformer_tiny", num_classes=4, **size))


@pytest.mark.parametrize(("kind", "target"), [("smooth-l1", "cls"), ("l2", "gap"), ("kl", "logit"), ("none", "cls")])
def test_replicas_one_by_one_give_the_joint_gradient(network: ResFormer, kind: str, target: str) -> None:
    batches = [
        ([torch.randn(4, 3, side, side) for side in (32, 24, 16)], torch.rand(4, 4).softmax(-1)) for _ in range(2)
    ]
    options: dict[str, Any] = {"kind": kind, "target": target, "alpha": 0.7}

    parts: list[Tensor] = []
    for views, soft in batches:
        backward_replicas(network.forward_train, views, [soft] * 3, base_loss, backward=parts.append, **options)
    torch.stack(parts).sum().div(2).backward()
    joint = {name: as_a(Tensor, parameter.grad).clone() for name, parameter in network.named_parameters()}
    network.zero_grad()

    for views, soft in batches:
        backward_replicas(network.forward_train, views, [soft] * 3, base_loss, share=1 / 2, **options)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, joint[name], rtol=1e-4, atol=1e-6, msg=name)


def test_only_the_last_backward_exchanges_gradients(network: ResFormer) -> None:
    events: list[str] = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        events.append("alone")
        yield
        events.append("together")

    def backward(loss: Tensor) -> None:
        events.append("backward")
        loss.backward()

    def forward(view: Tensor, wanted: tuple[str, ...]) -> dict[str, Tensor]:
        events.append("forward")
        return network.forward_train(view, wanted)

    views, soft = [torch.randn(2, 3, side, side) for side in (24, 16)], torch.full((2, 4), 0.25)
    arguments = (forward, views, [soft] * 2, base_loss)
    backward_replicas(*arguments, backward=backward, no_sync=no_sync, before_last=lambda losses: events.append("asked"))
    alone = ["alone", "forward", "backward", "together"]
    assert events == [*alone, "forward", "asked", "backward"]
    events.clear()
    backward_replicas(*arguments, backward=backward, no_sync=no_sync, synchronise=False)
    assert events == [*alone, *alone]
