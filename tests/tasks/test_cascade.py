"""Cascade R-CNN: what the stages hand on, what each is trained on, and what becomes of their votes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from anyres.tasks.detection.cascade import GIOU_WEIGHT, IOUS, WEIGHTS, Cascade, Stage, mask_targets
from anyres.tasks.detection.heads import RegionPool

LEVELS = [torch.zeros(1, 2, 16, 16)]
SIZES = [(64, 64)]
CLASSES = 3


class Says(nn.Module):
    """A box predictor that says the same of every region."""

    def __init__(self, logits: list[float], deltas: list[list[float]]) -> None:
        super().__init__()
        self.logits, self.deltas = torch.tensor(logits), torch.tensor(deltas)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits.expand(len(x), -1), self.deltas.expand(len(x), -1, -1)


def stage(i: int, logits: list[float], deltas: list[list[float]], **options: Any) -> Stage:
    parts: dict[str, Any] = {
        "box_roi_pool": RegionPool((4,), 1),
        "box_head": nn.Flatten(),
        "box_predictor": Says(logits, deltas),
        "score_thresh": 0.0,
        "nms_thresh": 1.0,
        "detections_per_img": 100,
    }
    return Stage(IOUS[i], i + 1.0, options.pop("giou", False), 16, **{**parts, **options})


def objects(*boxes: list[float]) -> list[dict[str, Tensor]]:
    return [{"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.zeros(len(boxes), dtype=torch.int64)}]


ZERO = [[0.0] * 4]


@pytest.mark.parametrize("deltas", [ZERO, ZERO * CLASSES])
def test_without_deltas_the_stages_return_the_proposals(deltas: list[list[float]]) -> None:
    cascade = Cascade([stage(i, [1.0, 0.0, 2.0, 0.0], deltas) for i in range(3)]).eval()
    proposals = torch.tensor([[4.0, 8.0, 30.0, 40.0], [10.0, 1.0, 64.0, 9.0]])
    (found,), losses = cascade(LEVELS, [proposals], SIZES)
    assert losses == {}
    best = found["boxes"][found["labels"] == 1]
    torch.testing.assert_close(best.sort(0).values, proposals.sort(0).values)
    assert len(found["boxes"]) == 2 * CLASSES
    torch.testing.assert_close(found["scores"][0], torch.tensor([1.0, 0.0, 2.0, 0.0]).softmax(0)[2])


def labels_of(heights: list[float], moves: list[list[list[float]]]) -> list[int]:
    """What each stage takes a 20 wide proposal for that has these heights, one per stage, before an object of 20x20."""
    cascade = Cascade([stage(i, [0.0] * 4, deltas) for i, deltas in enumerate(moves)])
    found = []
    for part, height in zip(cascade.stages, heights, strict=True):
        choose = part.select_training_samples

        def watch(*args: Any, choose: Any = choose, height: float = height) -> Any:
            proposals, matched, labels, wanted = choose(*args)
            off = (proposals[0] - torch.tensor([0.0, 0.0, 20.0, height])).abs().amax(1)
            assert off.min() < 1e-4
            found.append(labels[0][off.argmin()].item())
            return proposals, matched, labels, wanted

        part.select_training_samples = watch  # type: ignore[assignment]  # torch knows tensors and modules alone
    cascade(LEVELS, [torch.tensor([[0.0, 0.0, 20.0, heights[0]]])], SIZES, objects([0.0, 0.0, 20.0, 20.0]))
    return found


def test_overlaps_are_those_of_the_moved_boxes() -> None:
    """Overlap 0.55 is an object's for the first stage, 0.65 for the second, 0.75 for the third."""

    def taller(i: int, before: float, after: float) -> list[list[float]]:
        boxes = torch.tensor([[0.0, 0.0, 20.0, after]]), torch.tensor([[0.0, 0.0, 20.0, before]])
        return stage(i, [0.0] * 4, ZERO).box_coder.encode_single(*boxes).tolist()

    assert labels_of([11, 11, 11], [ZERO, ZERO, ZERO]) == [1, 0, 0]
    assert labels_of([11, 13, 13], [taller(0, 11, 13), ZERO, ZERO]) == [1, 1, 0]
    assert labels_of([11, 13, 15], [taller(0, 11, 13), taller(1, 13, 15), ZERO]) == [1, 1, 1]
    assert labels_of([13, 11, 15], [taller(0, 13, 11), taller(1, 11, 15), ZERO]) == [1, 0, 1]


def test_deviations_shrink_from_stage_to_stage() -> None:
    deltas = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    proposal = torch.tensor([[10.0, 10.0, 30.0, 30.0]])
    shifts = [
        stage(i, [0.0] * 4, ZERO).refine(torch.zeros(1, 4), deltas, [proposal], SIZES)[0][0, 0].item() - 10
        for i in range(3)
    ]
    assert shifts == pytest.approx([2.0, 1.0, 2 / 3], rel=1e-5)


def test_boxes_follow_their_best_class_and_stay_inside() -> None:
    deltas = torch.tensor([[[0.0] * 4, [5.0, 0.0, 0.0, 0.0], [0.0, 90.0, 0.0, 0.0]]]).repeat(2, 1, 1).requires_grad_()
    logits = torch.tensor([[9.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    proposals = [torch.tensor([[10.0, 10.0, 30.0, 30.0]]), torch.tensor([[10.0, 10.0, 30.0, 30.0]])]
    first, second = stage(0, [0.0] * 4, ZERO).refine(logits, deltas, proposals, [(64, 64), (50, 40)])
    assert first.tolist() == [[20.0, 10.0, 40.0, 30.0]]  # background is no class to follow
    assert second.tolist() == [[10.0, 50.0, 30.0, 50.0]]
    assert not first.requires_grad


def test_votes_are_averaged() -> None:
    logits = [[0.0, 2.0, 0.0, 0.0], [1.0, 0.0, 5.0, 0.0], [0.0, 1.0, 0.0, 3.0]]
    proposals = [torch.tensor([[10.0, 10.0, 30.0, 30.0]])]
    votes = torch.tensor(logits)
    for average, expected in (("probabilities", votes.softmax(1).mean(0)), ("logits", votes.mean(0).softmax(0))):
        cascade = Cascade([stage(i, vote, ZERO) for i, vote in enumerate(logits)], average).eval()  # type: ignore[arg-type]
        (found,), _ = cascade(LEVELS, proposals, SIZES)
        torch.testing.assert_close(found["scores"], expected[1:].sort(descending=True).values)
        assert found["labels"].tolist() == expected[1:].argsort(descending=True).tolist()


def test_losses_are_weighted_by_stage() -> None:
    truth = objects([10.0, 10.0, 30.0, 30.0])
    cascade = Cascade([stage(i, [0.0] * 4, ZERO) for i in range(3)])
    _, losses = cascade(LEVELS, [torch.tensor([[40.0, 40.0, 60.0, 60.0]])], SIZES, truth)
    assert sorted(losses) == sorted(f"loss_{what}_{i + 1}" for what in ("classifier", "box_reg") for i in range(3))
    for i, weight in enumerate(WEIGHTS):
        assert losses[f"loss_classifier_{i + 1}"].item() == pytest.approx(weight * torch.tensor(4.0).log().item())
    _, alone = Cascade([stage(0, [0.0] * 4, ZERO)])(LEVELS, [torch.zeros(0, 4)], SIZES, truth)
    assert sorted(alone) == ["loss_box_reg", "loss_classifier"]


@pytest.mark.parametrize(("heads", "weights"), [((0, 1, 2), WEIGHTS), ((2,), (1.0,))])
def test_the_only_mask_head_counts_whole(heads: tuple[int, ...], weights: tuple[float, ...]) -> None:
    truth = [{**objects([8.0, 8.0, 40.0, 40.0])[0], "masks": torch.ones(1, 64, 64, dtype=torch.uint8)}]
    mask: dict[str, Any] = {
        "mask_roi_pool": RegionPool((4,), 4),
        "mask_head": nn.Identity(),
        "mask_predictor": nn.Conv2d(2, CLASSES, 1, bias=False),
    }
    stages = [stage(i, [0.0] * 4, ZERO, **(mask if i in heads else {})) for i in range(3)]
    _, losses = Cascade(stages)(LEVELS, [torch.zeros(0, 4)], SIZES, truth)
    found = {name: loss.item() for name, loss in losses.items() if "mask" in name}
    # All maps are 0, so each logit costs log 2.
    chance = torch.tensor(2.0).log().item()
    assert found == {f"loss_mask_{i + 1}": pytest.approx(w * chance) for i, w in zip(heads, weights, strict=True)}


def test_generalised_overlap_of_the_decoded_boxes() -> None:
    truth = torch.tensor([[10.0, 10.0, 30.0, 30.0], [5.0, 5.0, 40.0, 25.0]])
    proposals = truth + torch.tensor([2.0, -1.0, 4.0, 3.0])
    part = stage(0, [0.0] * 4, ZERO, giou=True)
    wanted = part.box_coder.encode_single(truth, proposals)
    deltas = torch.zeros(2, CLASSES, 4)
    losses = part.box_losses(torch.zeros(2, 4), deltas, proposals, torch.tensor([1, 0]), wanted)
    expected = GIOU_WEIGHT * generalized_box_iou_loss(proposals[:1], truth[:1]).sum() / 2
    torch.testing.assert_close(losses["loss_box_reg"], expected)
    plain = stage(0, [0.0] * 4, ZERO).box_losses(torch.zeros(2, 4), deltas, proposals, torch.tensor([1, 0]), wanted)
    torch.testing.assert_close(plain["loss_box_reg"], wanted[0].abs().sum() / 2)


def test_nothing_proposed_and_nothing_there() -> None:
    cascade = Cascade([stage(i, [0.0] * 4, ZERO) for i in range(3)])
    _, losses = cascade(LEVELS, [torch.zeros(0, 4)], SIZES, objects())
    assert all(loss.item() == 0 for loss in losses.values())
    (found,), _ = cascade.eval()(LEVELS, [torch.zeros(0, 4)], SIZES)
    assert found["boxes"].shape == (0, 4)


def test_mask_targets_are_cut_at_pixel_borders() -> None:
    masks = torch.zeros(2, 16, 16, dtype=torch.uint8)
    masks[1, 4:8, 4:12] = 1
    boxes = torch.tensor([[4.0, 4.0, 12.0, 12.0], [4.0, 4.0, 12.0, 8.0], [0.0, 0.0, 16.0, 16.0]])
    first, second, third = mask_targets(masks, torch.tensor([1, 1, 0]), boxes, 4)
    assert first.tolist() == [[1] * 4, [1] * 4, [0] * 4, [0] * 4]
    assert second.all()
    assert not third.any()
