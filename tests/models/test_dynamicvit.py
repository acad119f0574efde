"""DynamicViT: what is left out, what replaces it, and what training does in its place, each against a plain twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyres.errors import UserError
from anyres.layers.sparsify import PolicyAttention, ScorePredictor, keep_count, two_paths
from anyres.models.dynamic_spatial import DynamicPyramid
from anyres.models.dynamicvit import DynamicViT
from tests.contract.small import image, small
from tests.typed import as_a

HOSTS = ("dynamicvit_deit_256", "dynamicvit_lvvit_small", "dynamicvit_convnext_tiny", "dynamicvit_swin_tiny")


@pytest.mark.parametrize(
    ("ratio", "counts"),
    [(0.5, [98, 49, 24]), (0.6, [117, 70, 42]), (0.7, [137, 96, 67]), (0.8, [156, 125, 100]), (0.9, [176, 158, 142])],
)
def test_published_counts(ratio: float, counts: list[int]) -> None:
    model = as_a(DynamicViT, small("dynamicvit_deit_256", keep_ratio=ratio))
    assert [keep_count(196, share) for share in model.keep_ratios] == counts
    decisions = model.forward_train(image(2, (224, 224), model))["decisions"]
    assert decisions.sum(-1).tolist() == [counts, counts]


def test_counts_of_the_hierarchical_hosts() -> None:
    shares = as_a(DynamicPyramid, small("dynamicvit_swin_tiny")).keep_ratios
    assert [keep_count(196, share) for share in shares] == [
        137,
        97,
        58,
    ]
    shares = as_a(DynamicPyramid, small("dynamicvit_convnext_tiny", keep_ratio=0.9)).keep_ratios
    assert [keep_count(196, share) for share in shares] == [176, 137, 98]
    assert keep_count(1, 0.3) == 1


def test_the_image_half_of_the_score_is_broadcast() -> None:
    torch.manual_seed(0)
    predictor, x = ScorePredictor(16), torch.randn(2, 9, 16)
    keep = torch.tensor([[1.0] * 4 + [0] * 5, [0] * 8 + [1.0]])
    z = torch.nn.functional.gelu(predictor.embed(predictor.norm(x)))
    mean = torch.stack([z[0, :4, 8:].mean(0), z[1, 8, 8:]])
    hidden = predictor.fc1(torch.cat((z[..., :8], mean[:, None].expand(-1, 9, -1)), dim=-1))
    hidden = predictor.fc2(torch.nn.functional.gelu(hidden))
    expected = predictor.fc3(torch.nn.functional.gelu(hidden)).log_softmax(-1)
    assert torch.allclose(predictor(x, keep), expected, atol=1e-6)


def test_a_key_decided_against_counts_only_for_itself() -> None:
    torch.manual_seed(0)
    attention, x = PolicyAttention(16, 2), torch.randn(2, 6, 16)
    keep = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 1]], requires_grad=True)
    out = attention(x, None, keep)
    for b in range(2):
        rows = [0, *(keep[b].nonzero()[:, 0] + 1).tolist()]
        for token in range(6):
            seen = sorted({*rows, token})
            alone = attention(x[b : b + 1, seen])[0, seen.index(token)]
            assert torch.allclose(out[b, token], alone, atol=1e-5)
    out.square().sum().backward()
    assert keep.grad is not None
    assert keep.grad.all()
    assert torch.allclose(attention(x, None, torch.ones(2, 5)), attention(x), atol=1e-5)


def test_rows_take_one_path_each() -> None:
    x, slow_rows, fast_rows = (
        torch.randn(2, 2, 3, 4),
        torch.tensor([0, 7, 5]),
        torch.tensor([1, 2, 3, 4, 6, 8, 9, 10, 11]),
    )
    out = two_paths(x, slow_rows, fast_rows, lambda rows: 2 * rows, lambda rows: -rows)
    factor = torch.full((12, 1), -1.0).index_fill(0, slow_rows, 2.0)
    assert torch.equal(out, (x.flatten(0, 2) * factor).view_as(x))


@torch.inference_mode()
def test_a_removed_patch_keeps_its_last_value() -> None:
    model = as_a(DynamicViT, small("dynamicvit_deit_256"))
    x = image(2, (97, 131), model)
    maps = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    decisions = model.forward_train(x)["decisions"]
    survivors = model.forward_features(x)[:, 1:]
    for b in range(2):
        for j, i in enumerate(model.prune_before):
            gone = decisions[b, j] == 0
            assert torch.equal(maps[i][b, gone], maps[i - 1][b, gone])
        kept = decisions[b, -1] == 1
        assert torch.allclose(model.norm(maps[-1][b, kept]), survivors[b], atol=1e-5)
    assert not torch.equal(decisions[0], decisions[1])


@pytest.mark.parametrize("name", HOSTS)
@torch.inference_mode()
def test_without_predictors_it_is_the_host(name: str) -> None:
    host = small(name, prune_before=())
    everything = small(name, **({"keep_ratio": 1.0} if "deit" in name or "lvvit" in name else {}))
    shared = host.load_state_dict(everything.state_dict(), strict=False)
    assert not shared.missing_keys
    assert all("predictors" in key or "fast" in key for key in shared.unexpected_keys)
    x = image(2, (97, 131), host)
    assert "decisions" not in host.forward_train(x)
    assert isinstance(everything, DynamicViT | DynamicPyramid)
    if everything.keep_ratios[-1] == 1:
        assert torch.allclose(host(x), everything(x), atol=1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_in_training_decisions_are_sampled(name: str) -> None:
    model = small(name).train()
    x = image(2, (128, 128), model)

    def decisions(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.forward_train(x)["decisions"].detach().round()

    assert torch.equal(decisions(0), decisions(0))
    assert not torch.equal(decisions(0), decisions(1))
    if "deit" in name or "lvvit" in name:
        assert (decisions(0).diff(dim=1) <= 0).all()  # a patch decided against stays so


def test_options_that_cannot_work() -> None:
    for options in (
        {"keep_ratio": 0.0},
        {"keep_ratio": 1.5},
        {"position": "rope"},
        {"windows": "constant"},
        {"prune_before": (2, 1)},
        {"prune_before": (1, 99)},
    ):
        with pytest.raises(UserError, match=next(iter(options))):
            small("dynamicvit_deit_256", **options)
    with pytest.raises(ValueError, match=r"above 0\.4"):
        small("dynamicvit_swin_tiny", keep_ratio=0.4)
