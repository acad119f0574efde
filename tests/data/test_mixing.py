from typing import Any

import pytest
import torch
from torch.nn import functional as F

from anyres.data import Mixing, smooth_labels
from anyres.data.seeding import generator
from anyres.errors import UserError

LABELS = torch.tensor([0, 1, 2, 1])


def batch(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.rand(4, 3, height, width) for height, width in sizes]


def test_smoothing_alone_leaves_images_alone() -> None:
    views = batch((8, 8))
    mixed, targets = Mixing(num_classes=5, mixup=0, cutmix=0, smoothing=0.1)(views, LABELS, 0, 0)
    assert torch.equal(mixed[0], views[0])
    expected = F.one_hot(LABELS, 5) * 0.9 + 0.1 / 5
    torch.testing.assert_close(targets[0], expected)
    # The loss against soft targets is torch's own smoothed loss.
    logits = torch.randn(4, 5)
    torch.testing.assert_close(
        F.cross_entropy(logits, targets[0]), F.cross_entropy(logits, LABELS, label_smoothing=0.1)
    )


def test_mixup_is_the_same_blend_of_every_view_and_of_the_labels() -> None:
    views = batch((8, 8), (6, 6), (4, 5))
    mixing = Mixing(num_classes=3, mixup=0.8, cutmix=0, smoothing=0.1, seed=3)
    mixed, targets = mixing(views, LABELS, 2, 7)
    # λ from the first view: mixed = λ·x + (1-λ)·flip
    flipped = views[0].flip(0)
    lam = ((mixed[0] - flipped) / (views[0] - flipped)).median()
    assert 0 < lam < 1
    for view, got in zip(views, mixed, strict=True):
        torch.testing.assert_close(got, lam * view + (1 - lam) * view.flip(0), atol=1e-5, rtol=1e-5)
    soft = F.one_hot(LABELS, 3) * 0.9 + 0.1 / 3
    for target in targets:
        torch.testing.assert_close(target, lam * soft + (1 - lam) * soft.flip(0), atol=1e-5, rtol=1e-5)


def box_of(original: torch.Tensor, mixed: torch.Tensor) -> tuple[int, int, int, int]:
    """The rectangle in which a mixed batch shows the partner."""
    changed = (original != mixed).any(dim=(0, 1))
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    if not len(rows):
        return 0, 0, 0, 0
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


@pytest.mark.parametrize("step", range(12))
def test_cutmix_shares_one_box_scaled_with_truncation(step: int) -> None:
    sizes = [(40, 32), (25, 20), (11, 13)]
    views = batch(*sizes)
    mixed, targets = Mixing(num_classes=3, mixup=0, cutmix=1.0, smoothing=0, seed=1)(views, LABELS, 0, step)
    top, bottom, left, right = box_of(views[0], mixed[0])
    lam = 1 - (bottom - top) * (right - left) / (40 * 32)
    one_hot = F.one_hot(LABELS, 3).float()
    for view, got, (height, width), target in zip(views, mixed, sizes, targets, strict=True):
        expected = view.clone()
        a, b = int(top * height / 40), int(bottom * height / 40)
        c, d = int(left * width / 32), int(right * width / 32)
        expected[:, :, a:b, c:d] = view.flip(0)[:, :, a:b, c:d]
        assert torch.equal(got, expected)
        torch.testing.assert_close(target, lam * one_hot + (1 - lam) * one_hot.flip(0))


def test_cutmix_box_follows_the_formula() -> None:
    """Independent computation of one draw from the same random numbers: switch, λ, centre row, centre column."""
    views = batch((30, 50))
    mixed, _ = Mixing(num_classes=3, mixup=0.8, cutmix=1.0, switch_prob=1.0, seed=9)(views, LABELS, 4, 5)
    rng = generator("mix", 9, 4, 5)
    rng.random(), rng.random()
    root = (1 - rng.betavariate(1.0, 1.0)) ** 0.5
    height, width, row, column = int(30 * root), int(50 * root), rng.randrange(30), rng.randrange(50)
    expected = (
        max(0, row - height // 2),
        min(30, row + height // 2),
        max(0, column - width // 2),
        min(50, column + width // 2),
    )
    assert box_of(views[0], mixed[0]) == expected


def test_probabilities() -> None:
    views = batch((8, 8))
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    mixing = Mixing(num_classes=3, mix_prob=0.6, switch_prob=0.25)
    for step in range(400):
        (mixed,), _ = mixing(views, LABELS, 0, step)
        share = (mixed == views[0]).float().mean()
        kinds["none" if share == 1 else "mixup" if share == 0 else "cutmix"] += 1
    assert abs(kinds["mixup"] - 400 * 0.6 * 0.75) < 45
    # A CutMix box may be empty or everything, so its count and that of "none" are blurred a little.
    assert abs(kinds["cutmix"] - 400 * 0.6 * 0.25) < 40


def test_shared_and_separate_draws() -> None:
    views = batch((16, 16), (16, 16))
    views[1] = views[0].clone()
    shared, targets = Mixing(num_classes=3, seed=1)(views, LABELS, 0, 0)
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(targets[0], targets[1])
    apart, targets = Mixing(num_classes=3, seed=1, separate_mix=True)(views, LABELS, 0, 0)
    assert not torch.equal(apart[0], apart[1])
    assert not torch.equal(targets[0], targets[1])


def test_draws_depend_on_epoch_and_step_only_and_inputs_are_kept() -> None:
    views = batch((8, 8))
    kept = views[0].clone()
    mixing = Mixing(num_classes=3)
    first, _ = mixing(views, LABELS, 1, 2)
    torch.manual_seed(99)
    again, _ = mixing(views, LABELS, 1, 2)
    other, _ = mixing(views, LABELS, 2, 1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(views[0], kept)


def test_targets_sum_to_one() -> None:
    for step in range(20):
        _, targets = Mixing(num_classes=7, separate_mix=True)(batch((8, 8), (5, 5)), LABELS, 0, step)
        for target in targets:
            torch.testing.assert_close(target.sum(1), torch.ones(4))
    assert smooth_labels(LABELS, 4, 0.0).tolist() == F.one_hot(LABELS, 4).tolist()


@pytest.mark.parametrize(
    "wrong", [{"mixup": -1}, {"cutmix": float("inf")}, {"mix_prob": 2}, {"smoothing": -0.1}, {"num_classes": 0}]
)
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Mixing(**{"num_classes": 3, **wrong})
