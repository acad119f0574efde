"""Deformable attention: against a plain reading of its definition."""

from __future__ import annotations

import torch

from anyres.layers.deformable import DeformableAttention, cell_centres


def read(image_hwd: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Bilinear value at (x, y) in cells, half-pixel centres, zero outside."""
    h, w, _ = image_hwd.shape
    x, y = x - 0.5, y - 0.5
    total = torch.zeros(image_hwd.shape[-1])
    for row in (int(y // 1), int(y // 1) + 1):
        for column in (int(x // 1), int(x // 1) + 1):
            if 0 <= row < h and 0 <= column < w:
                total = total + image_hwd[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


@torch.no_grad()
def test_equals_its_definition() -> None:
    torch.manual_seed(0)
    layer = DeformableAttention(8, 2, levels=2, points=3)
    layer.reset_parameters()
    layer.sampling_offsets.weight.normal_(std=0.3)
    layer.attention_weights.weight.normal_(std=0.3)
    grids = ((3, 4), (2, 2))
    query, values = torch.randn(1, 6, 8), torch.randn(1, 16, 8)
    places = cell_centres(((2, 3),), query.device)
    offsets = layer.sampling_offsets(query)[0].view(6, 2, 2, 3, 2)
    weights = layer.attention_weights(query)[0].view(6, 2, 6).softmax(-1).view(6, 2, 2, 3)
    maps = [m.view(*g, 2, 4) for m, g in zip(layer.value_proj(values)[0].split([12, 4]), grids, strict=True)]
    out = torch.zeros(6, 2, 4)
    for i in range(6):
        for head in range(2):
            for level, (h, w) in enumerate(grids):
                for point in range(3):
                    x, y = (places[i] * torch.tensor([w, h]) + offsets[i, head, level, point]).tolist()
                    out[i, head] += weights[i, head, level, point] * read(maps[level][:, :, head], x, y)
    expected = layer.output_proj(out.flatten(1))[None]
    torch.testing.assert_close(layer(query, places, values, grids), expected, atol=1e-5, rtol=1e-4)


def test_points_start_around_the_query() -> None:
    layer = DeformableAttention(12, 6, levels=1)
    layer.reset_parameters()
    offsets = layer.sampling_offsets.bias.view(6, 4, 2)
    torch.testing.assert_close(offsets.abs().amax(-1), torch.arange(1.0, 5).expand(6, 4))
    torch.testing.assert_close(offsets[0, 2], torch.tensor([3.0, 0.0]))
