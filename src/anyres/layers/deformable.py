"""Multi-scale deformable attention: each query attends to a few points whose positions it predicts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.layers.size_cache import cached_by_size
from anyres.shapes import Grid


@cached_by_size()
def cell_centres(grids: tuple[Grid, ...], device: torch.device) -> Tensor:
    """Return the cell centres (x, y) of these grids in [0, 1] as (N, 2), grid after grid, row by row."""
    centres = []
    for h, w in grids:
        rows, columns = ((torch.arange(side, device=device) + 0.5) / side for side in (h, w))
        centres.append(torch.stack((columns.expand(h, w), rows[:, None].expand(h, w)), dim=-1).flatten(0, 1))
    return torch.cat(centres)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (MSDA; Deformable DETR, section 4.1).

    For each head, level and point, the query predicts linearly an offset from its own position and a weight. The result
    is the weighted sum of the values at these points. Values are sampled bilinearly with half-pixel centres, and are
    zero outside the map. Offsets are in cells of the level they refer to. They are initialised so that head j points in
    direction 2πj / heads, and point p is at distance p + 1.
    """

    def __init__(self, dim: int, num_heads: int, levels: int, points: int = 4) -> None:
        super().__init__()
        self.shape = (num_heads, levels, points)
        self.sampling_offsets = nn.Linear(dim, num_heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        heads, levels, points = self.shape
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, points + 1)[:, None]
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        offsets = (direction[:, None, None] * distance).expand(heads, levels, points, 2)
        self.sampling_offsets.bias.copy_(offsets.flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query_BNC: Tensor, places_N2: Tensor, values_BMC: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        """Apply attention: (B, N, C) → (B, N, C).

        `places_N2` are the positions (x, y) of the queries in [0, 1]. `values_BMC` are the maps of the sizes in
        `grids`, concatenated.
        """
        heads, levels, points = self.shape
        B, N, C = query_BNC.shape
        weights = self.attention_weights(query_BNC).view(B, N, heads, levels * points).float().softmax(-1)
        offsets = self.sampling_offsets(query_BNC).view(B, N, heads, levels, points, 2).float()
        maps = self.value_proj(values_BMC).float().split([h * w for h, w in grids], dim=1)
        samples = []
        for level, ((h, w), map_) in enumerate(zip(grids, maps, strict=True)):
            offset = torch.stack((offsets[:, :, :, level, :, 0] / w, offsets[:, :, :, level, :, 1] / h), dim=-1)
            at = 2 * (places_N2[:, None, None] + offset) - 1  # (B, N, heads, points, 2)
            image = map_.unflatten(1, (h, w)).unflatten(-1, (heads, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
            samples.append(F.grid_sample(image, at.transpose(1, 2).flatten(0, 1), align_corners=False))
        read = torch.cat(samples, dim=-1)  # (B·heads, d, N, levels·points)
        out = (read * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        return self.output_proj(out.view(B, C, N).transpose(1, 2).to(query_BNC.dtype))
