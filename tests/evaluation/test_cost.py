from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from anyres import create_model
from anyres.evaluation import measure_cost
from anyres.evaluation.cost import count_flops, peak_memory_bytes
from anyres.models.resformer import ResFormer
from tests.typed import as_a


def plain_vit_flops(height: int, width: int, embed_dim: int, depth: int, classes: int, local: bool = False) -> int:
    """2 × (12·n·D² + 2·n²·D) in every block, patch embedding, head; 9·N·D more for local positions (ResFormer)."""
    patches = (height // 16) * (width // 16)
    tokens = patches + 1
    block = 12 * tokens * embed_dim**2 + 2 * tokens**2 * embed_dim + (9 * patches * embed_dim if local else 0)
    once = 768 * patches * embed_dim + embed_dim * classes + (9 * patches * embed_dim if local else 0)
    return 2 * (depth * block + once)


def test_deit_small_has_the_published_number() -> None:
    with torch.device("cpu"):
        model = timm.create_model("deit_small_patch16_224").eval()
    flops = count_flops(model, torch.zeros(1, 3, 224, 224))
    assert flops == plain_vit_flops(224, 224, 384, 12, 1000)
    assert flops / 1e9 == pytest.approx(9.20, abs=0.005)  # 4.60 GMAC


@pytest.mark.parametrize(("size", "gmacs"), [((224, 224), 4.61), ((128, 128), 1.44)])
def test_resformer_small_matches_its_table(size: tuple[int, int], gmacs: float) -> None:
    model = as_a(ResFormer, create_model("resformer_small")).eval()
    images = torch.zeros(1, 3, *size)

    class AllTokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model.forward_head(model.forward_features(x))

    flops = count_flops(AllTokens(), images)
    assert flops == plain_vit_flops(size[0], size[1], 384, 12, 1000, local=True)
    assert flops / 2e9 == pytest.approx(gmacs, abs=0.006)
    # The logits alone need one query in the last block: what runs is what counts.
    tokens, width = (size[0] // 16) * (size[1] // 16) + 1, 384
    saved = (tokens - 1) * (9 * width**2 + 2 * tokens * width)
    assert count_flops(model, images) == flops - 2 * saved


def test_fused_and_plain_attention_count_alike() -> None:
    class Attention(nn.Module):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            self.fused = fused

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = x[:, :, :5, :8], x[:, :, :, 8:16], x[:, :, :, 16:]
            if self.fused:
                return nn.functional.scaled_dot_product_attention(q, k, v)
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    x = torch.randn(2, 3, 7, 24)
    wanted = 2 * 2 * 3 * (5 * 7 * 8 + 5 * 7 * 8)
    assert count_flops(Attention(True), x) == count_flops(Attention(False), x) == wanted


def test_measure_cost_is_per_image_and_leaves_the_model_as_it_was() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10, img_size=(64, 96)).train()
    cost = measure_cost(model, (64, 96), batch_size=4, seconds=0.0)
    assert cost.gflops == plain_vit_flops(64, 96, 192, 2, 10) / 1e9
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())
    assert cost.images_per_second > 0
    assert cost.latency_ms > 0
    assert model.training


def test_batches_count_for_speed() -> None:
    class Sleeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            import time

            time.sleep(0.02)  # a batch takes as long as an image
            return x.mean((1, 2, 3))

    cost = measure_cost(Sleeps(), (8, 8), batch_size=10, seconds=0.0)
    assert 20 <= cost.latency_ms < 60
    assert 10 / 0.06 < cost.images_per_second <= 500


class Chain(nn.Module):
    """Widens (B, 1, 8, 8) to 100 and then 1000 times its size, and takes the mean: what lives when is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))
        self.alias = self.weight  # counts once

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(-1, 100, -1, -1) * 2  # lives: 100 units
        view = x.flatten(1)  # a view costs nothing
        view.add_(1)  # in place neither
        x = torch.cat([x] * 10, 1)  # lives: 100 (held by the view) + 1000 units
        del view
        return x.mean((1, 2, 3))  # the 100 units are gone here


def test_peak_memory_is_what_lives_at_once() -> None:
    batch = 2
    images = torch.zeros(batch, 1, 8, 8)
    unit = batch * 64 * 4
    assert peak_memory_bytes(Chain(), images) == 4000 + unit + 1100 * unit


def test_peak_memory_frees_what_is_dropped() -> None:
    depth = 50
    model = nn.Sequential(*[nn.ReLU() for _ in range(depth)])
    images = torch.zeros(1, 3, 32, 32)
    # Input, plus the one activation that goes in and the one that comes out; never all fifty.
    assert peak_memory_bytes(model, images) == 3 * images.nbytes


def test_a_wrong_precision_is_named() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        measure_cost(nn.Flatten(), (8, 8), precision="int3")
