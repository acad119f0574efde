"""Position encodings for tokens on any grid (h, w).

Each acts in one of four places, and a model can combine several:

| applied to | classes | source |
|---|---|---|
| the tokens, added once | `AbsoluteTable`, `SineMap`, `GlobalPositionEmbedding` | ViT; DETR; ResFormer (GPE) |
| the attention logits, added | `RelativeBiasTable`, `ContinuousBias` | Swin; Swin v2 |
| | `FunctionalBias`, `FieldsOfView` | FIRE; LookHere |
| | `ParabolicBias`, by widening queries and keys | PaPE |
| queries and keys, rotated or scaled | `AxialRotary`, `LogScale` | RoFormer, in normalised axial coordinates |
| the attention output, added | `LocalPositionEmbedding` | ResFormer (LPE) |

One file, though long: all encodings are here, so that they can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.errors import UserError
from anyres.layers.maps import by_group, from_groups, on_map
from anyres.layers.parameter_cache import cached_for_parameter
from anyres.layers.resample import resample_table
from anyres.layers.size_cache import cached_by_size
from anyres.layers.sizes import same
from anyres.shapes import Grid

# Added to the tokens ------------------------------------------------------------------------------------------------


class AbsoluteTable(nn.Module):
    """A learned vector for each token of the native grid, including prefix tokens (ViT).

    Other grids are resampled, bicubically in DeiT and bilinearly in UViT. The stored table (1, prefix + h·w, dim) never
    changes with the input. Resampling follows DeiT's fine-tuning rule: prefix rows stay, and the rest is resized in
    float32 with `align_corners=False` and no antialiasing.
    """

    def __init__(
        self, dim: int, native_grid: Grid, num_prefix: int, mode: Literal["bicubic", "bilinear"] = "bicubic"
    ) -> None:
        super().__init__()
        self.mode = mode
        self.native_grid = native_grid
        self.num_prefix = num_prefix
        self.table = nn.Parameter(torch.empty(1, num_prefix + native_grid[0] * native_grid[1], dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: Grid) -> Tensor:
        """Return the table (1, prefix + h·w, dim) for this grid."""
        return self._resize(self.table, self.native_grid, grid)

    def fit(self, table: Tensor) -> Tensor:
        """Resize a stored table from another (square) native grid to this one's, if they differ.

        If the model has no prefix tokens, rows for prefix tokens are dropped.
        """
        if table.shape == self.table.shape:
            return table
        count = max(table.shape[1] - self.num_prefix, 0)
        side = math.isqrt(count)
        rest = count - side * side
        if self.num_prefix == 0 and rest in (1, 2):
            table, rest = table[:, rest:], 0
        return table if rest or not side else self._resize(table, (side, side), self.native_grid)

    def _resize(self, table: Tensor, source: Grid, target: Grid) -> Tensor:
        if same(source, target):
            return table
        prefix, patches = table[:, : self.num_prefix], table[:, self.num_prefix :]
        resized = resample_table(patches.transpose(1, 2).unflatten(2, source), target, self.mode)
        return torch.cat((prefix, resized.flatten(2).transpose(1, 2).to(prefix.dtype)), dim=1)


@cached_by_size()
def sine_map(grid: Grid, dim: int, device: torch.device) -> Tensor:
    """Return the sine position map (1, dim, h, w), whose channel halves encode the row and the column.

    ResFormer section 3.3 (after DETR): y_i = 2π·i / (h + 1e-6) for i = 1..h, likewise x_j; channel m has frequency
    10000^(-2·floor(m/2)/(dim/2)), sine for even and cosine for odd channels. Coordinates are normalised by the current
    grid, so a larger image samples the same map more finely. float32.
    """
    half = dim // 2
    channel = torch.arange(half, dtype=torch.float32, device=device)
    frequency = 10000 ** (-2 * torch.div(channel, 2, rounding_mode="floor") / half)
    odd = channel % 2 == 1

    def code(length: int) -> Tensor:
        steps = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        unit = 2 * math.pi / (torch.full((), length, dtype=torch.float64, device="cpu") + 1e-6)
        angle = (steps * unit.float().to(device))[:, None] * frequency
        return torch.where(odd, angle.cos(), angle.sin())  # (length, half)

    h, w = grid
    rows = code(h)[:, None, :].expand(h, w, half)
    columns = code(w)[None, :, :].expand(h, w, half)
    return torch.cat((rows, columns), dim=-1).permute(2, 0, 1)[None].contiguous()


class SineMap(nn.Module):
    """The sine map alone, without parameters (GPE† in ResFormer's ablation). It is zero for prefix tokens."""

    def __init__(self, dim: int, num_prefix: int) -> None:
        super().__init__()
        _check_multiple(dim, 4, "the sine map")
        self.dim = dim
        self.num_prefix = num_prefix

    def map(self, grid: Grid, like: Tensor) -> Tensor:
        return sine_map(grid, self.dim, like.device).to(like.dtype)

    def forward(self, grid: Grid, like: Tensor) -> Tensor:
        """Return (1, prefix + h·w, dim) with the dtype and device of `like`."""
        return F.pad(self.map(grid, like).flatten(2).transpose(1, 2), (0, 0, self.num_prefix, 0))


class GlobalPositionEmbedding(SineMap):
    """GPE: the sine map after a depthwise 3x3 convolution (ResFormer section 3.3). It is zero for prefix tokens."""

    def __init__(self, dim: int, num_prefix: int) -> None:
        super().__init__(dim, num_prefix)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def map(self, grid: Grid, like: Tensor) -> Tensor:
        return self.conv(super().map(grid, like))


# Added to the attention output --------------------------------------------------------------------------------------


class LocalPositionEmbedding(nn.Module):
    """LPE: a depthwise 3x3 convolution of the values, added to the attention output (ResFormer section 3.3).

    All heads share one set of head_dim filters, as in the published checkpoints; the paper's text does not mention
    this. The filters are initialised to zero, so that a new block is plain attention. Nothing is added to prefix
    tokens.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(head_dim, head_dim, 3, padding=1, groups=head_dim)
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def forward(self, v_BNC: Tensor, grid: Grid, heads: int) -> Tensor:
        """Return the term to add, given the patches' values (B, h·w, heads·head_dim); same shape."""
        return from_groups(on_map(self.conv, by_group(v_BNC.unflatten(1, grid), heads)), heads).flatten(1, 2)


# Added to the attention logits --------------------------------------------------------------------------------------


class LogitBias(Protocol):
    """A bias for pairs of tokens that is added to the logits."""

    def __call__(self, grid: Grid, num_prefix: int, like: Tensor, /) -> Tensor:
        """(1, heads, prefix + N, prefix + N) in the dtype and on the device of `like`."""


@cached_by_size()
def relative_index(grid: Grid, device: torch.device) -> Tensor:
    """Return (N, N) indices into a flattened (2h-1, 2w-1) table; entry (i, j) is the offset of query i from key j."""
    h, w = grid
    rows = torch.arange(h, device=device)[:, None].expand(h, w).flatten()
    columns = torch.arange(w, device=device).expand(h, w).flatten()
    return (rows[:, None] - rows[None] + h - 1) * (2 * w - 1) + columns[:, None] - columns[None] + w - 1


def _bias_from_offsets(table: Tensor, grid: Grid, num_prefix: int) -> Tensor:
    """Expand biases per offset (heads, 2h-1, 2w-1) to (1, heads, prefix + N, prefix + N), zero for prefix tokens."""
    bias = table.flatten(1)[:, relative_index(grid, table.device)]
    return F.pad(bias, (num_prefix, 0, num_prefix, 0))[None]


@cached_for_parameter()
def relative_bias(table: Tensor, grid: Grid, num_prefix: int = 0) -> Tensor:
    """Return the bias (1, heads, prefix + N, prefix + N) of a grid from a table (heads, 2h-1, 2w-1).

    The table is resampled bicubically if it belongs to another grid.
    """
    return _bias_from_offsets(resample_table(table, (2 * grid[0] - 1, 2 * grid[1] - 1)), grid, num_prefix)


class RelativeBiasTable(nn.Module):
    """RPB: a learned bias for each head and offset (Swin, equation 4), resampled bicubically for other grids."""

    def __init__(self, num_heads: int, native_grid: Grid) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_heads, 2 * native_grid[0] - 1, 2 * native_grid[1] - 1))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: Grid, num_prefix: int, like: Tensor) -> Tensor:
        """Return (1, heads, prefix + N, prefix + N) with the dtype of `like`."""
        return relative_bias(self.table, grid, num_prefix).to(like.dtype)

    def fit(self, table: Tensor) -> Tensor:
        """Resize a stored table with another native grid to this one's; a table that fits is returned unchanged."""
        return resample_table(table, (self.table.shape[-2], self.table.shape[-1]))


@cached_by_size()
def log_offsets(grid: Grid, native_grid: Grid, device: torch.device) -> Tensor:
    """Return log-spaced offsets (2h-1, 2w-1, 2): sign(Δ)·log2(1 + |Δ|) / log2(8), with Δ = 8 at the native extent.

    See Swin v2, equation 4.
    """

    def axis(length: int, native: int) -> Tensor:
        offset = torch.arange(1 - length, length, dtype=torch.float32, device=device) * 8 / max(native - 1, 1)
        return offset.sign() * (1 + offset.abs()).log2() / 3

    rows, columns = axis(grid[0], native_grid[0]), axis(grid[1], native_grid[1])
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)


class ContinuousBias(nn.Module):
    """CPB: a small network maps log-spaced offsets to a bias per head, 16·sigmoid (Swin v2, section 3.3)."""

    def __init__(self, num_heads: int, native_grid: Grid, hidden: int = 512) -> None:
        super().__init__()
        self.native_grid = native_grid
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, num_heads, bias=False)

    def forward(self, grid: Grid, num_prefix: int, like: Tensor) -> Tensor:
        """Return (1, heads, prefix + N, prefix + N) with the dtype and device of `like`."""
        offsets = log_offsets(grid, self.native_grid, like.device).to(like.dtype)
        table = 16 * self.fc2(self.fc1(offsets).relu()).sigmoid()
        return _bias_from_offsets(table.permute(2, 0, 1), grid, num_prefix).to(like.dtype)


@cached_by_size()
def token_offsets(grid: Grid, device: torch.device) -> Tensor:
    """Return offsets (2h-1, 2w-1, 2) in tokens, query minus key, rows first."""
    rows, columns = (torch.arange(1 - side, side, dtype=torch.float32, device=device) for side in grid)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)


class FunctionalBias(nn.Module):
    """FIRE in two dimensions: a small network maps normalised log distances to a bias per head.

    Source: Li et al., "Functional Interpolation for Relative Positions", ICLR 2024, arXiv 2310.04418. For each axis,
    the network's input is sign(Δ)·ψ(|Δ|) / ψ(max(L, side)) with ψ(x) = log(1 + c·x) and Δ in tokens, so distances are
    relative to the image if its side is above a threshold L, and absolute below. c and L > 0 are learnt (as
    logarithms). The paper treats causal text and normalises by the query's position; images have no direction, so here
    the grid's side is used. c starts at 1 and not at the paper's 0.1, which suits hundreds of tokens in a row; L starts
    at the native side.
    """

    def __init__(self, num_heads: int, native_grid: Grid, hidden: int = 32) -> None:
        super().__init__()
        self.log_slope = nn.Parameter(torch.zeros(1))
        self.log_threshold = nn.Parameter(torch.tensor(native_grid).log())
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, num_heads, bias=False)

    def forward(self, grid: Grid, num_prefix: int, like: Tensor) -> Tensor:
        """(1, heads, prefix + N, prefix + N) in the dtype and on the device of `like`."""
        offsets = token_offsets(grid, like.device)
        sides = torch.stack([torch.full((), side, dtype=torch.float32, device=like.device) for side in grid])
        slope = self.log_slope.exp()
        distances = (slope * offsets.abs()).log1p() / (slope * torch.maximum(self.log_threshold.exp(), sides)).log1p()
        table = self.fc2(self.fc1((offsets.sign() * distances).to(like.dtype)).relu())
        return _bias_from_offsets(table.permute(2, 0, 1), grid, num_prefix).to(like.dtype)


VIEWS = ((0, 1), (0, -1), (-1, 0), (1, 0), (-1, 1), (1, -1), (-1, -1), (1, 1))
"""Directions (down, right) of `FieldsOfView`; opposite ones are neighbours, so that few heads cover both sides."""


@cached_by_size(maximum=8)
def fields_of_view(
    grid: Grid, heads: int, first: int, num_prefix: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the bias (1, heads, prefix + N, prefix + N): -slope·distance in a head's field of view, -inf outside.

    Directed heads start with direction `first` of `VIEWS`.
    """
    offsets = -token_offsets(grid, device)  # position of the key relative to the query
    distance = offsets.norm(dim=-1)
    per_head, directed = [], 0
    for head in range(heads):
        if head % 3 == 2:
            per_head.append(distance * 0.25 ** (head // 3 + 1))
            continue
        direction = torch.tensor(VIEWS[(first + directed) % len(VIEWS)], dtype=torch.float32, device=device)
        directed += 1
        # Within 45 degrees to either side; the margin includes keys exactly on the edge.
        ahead = offsets @ (direction / direction.norm()) >= distance * (math.sqrt(0.5) - 1e-4)
        per_head.append(torch.where(ahead, distance, torch.inf))
    return -_bias_from_offsets(torch.stack(per_head), grid, num_prefix).to(dtype)


class FieldsOfView(nn.Module):
    """LookHere: each head attends in one direction, with a penalty for distance; no parameters.

    Source: Fuller et al., NeurIPS 2024, arXiv 2405.13985. Two of every three heads are directed: they see only patches
    within a quadrant (90 degrees) around their direction, and the query's own patch. The third sees all patches.
    Directions cycle through the eight `VIEWS` from head to head and continue from block to block, so that a network
    with few heads also covers all of them. Visible keys get the bias -slope·distance (Euclidean, in tokens, so it does
    not depend on the image size). The slope is the head's (1 for directed heads, 1/4, 1/16, … for the others) times the
    block's, which falls linearly from 1.5 in the first block to 0.5 in the last. Prefix tokens see all tokens and are
    seen by all. The shares of heads, their order and their slopes for any number of heads are our own choice, based on
    the paper's idea.
    """

    def __init__(self, num_heads: int, block: int, depth: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.first = block * (num_heads - num_heads // 3) % len(VIEWS)
        self.slope = 1.5 - block / max(depth - 1, 1)

    def forward(self, grid: Grid, num_prefix: int, like: Tensor) -> Tensor:
        """(1, heads, prefix + N, prefix + N) in the dtype and on the device of `like`."""
        return self.slope * fields_of_view(grid, self.num_heads, self.first, num_prefix, like.dtype, like.device)


# Added to the logits by widening queries and keys --------------------------------------------------------------------


@cached_by_size()
def centred_coordinates(grid: Grid, num_prefix: int, device: torch.device) -> Tensor:
    """Return (1, row, column) of every patch, measured from the centre of the image, (prefix + h·w, 3) in float32.

    The unit is half the side of the square with the same area. Both axes have the same unit, so that distances keep the
    image's proportions; on a square image of any size, coordinates are in [-1, 1]. Prefix tokens have zeros.
    """
    h, w = grid
    unit = torch.full((), h * w, dtype=torch.float32, device=device).sqrt()
    rows, columns = ((2 * torch.arange(side, dtype=torch.float32, device=device) + 1 - side) / unit for side in grid)
    places = torch.stack(
        (torch.ones(h, w, device=device), rows[:, None].expand(h, w), columns[None].expand(h, w)), dim=-1
    )
    return F.pad(places.reshape(h * w, 3), (0, 0, num_prefix, 0))


class Widening(NamedTuple):
    """Extra channels of queries and keys, (B or 1, heads or 1, N, 8) each, whose product is a bias."""

    of_queries: Tensor
    of_keys: Tensor

    def queries(self, q_BhNd: Tensor) -> Tensor:
        return torch.cat((q_BhNd, self.of_queries), dim=-1)

    def keys(self, k_BhNd: Tensor) -> Tensor:
        return torch.cat((k_BhNd, self.of_keys.expand(*k_BhNd.shape[:2], -1, -1)), dim=-1)


class ParabolicBias(nn.Module):
    """PaPE: a sum of parabolas of the relative position, with coefficients that depend on the query.

    Source: Øhrstrøm et al., "Parabolic Position Encoding", arXiv 2602.01418. For Δ = key position - query position (see
    `centred_coordinates`), the bias of a head is Σ_m -a_m·(u_m·Δ)² + b_m·(u_m·Δ). The directions u_m are learnt per
    head; the curvatures a_m > 0 (softplus) and slopes b_m are linear functions of the head's query. Multiplied out,
    this is a product of 6 channels of the query and 6 of the key (padded to 8, because kernels need a multiple of 8),
    so no N x N mask is needed. The bias is 0 from and to prefix tokens. `isotropic` (PaPE-RI) keeps only -a·|Δ|², which
    does not change when the image is rotated.

    Initially, curvatures range from wide in the first head (1/4) to narrow in the last (16), slopes are zero and
    directions are evenly spread. This initialisation, the unit, and the query as the context are our own choice, based
    on the paper's idea.
    """

    def __init__(self, num_heads: int, head_dim: int, isotropic: bool = False, parabolas: int = 4) -> None:
        super().__init__()
        self.directions: nn.Parameter | None = None
        count = 1
        start = torch.logspace(-2, 4, num_heads, base=2)[:, None]
        if not isotropic:
            angles = torch.arange(parabolas) * (math.pi / parabolas)
            spread = torch.stack((angles.cos(), angles.sin()), dim=-1)  # Σ u·uᵀ = parabolas / 2
            self.directions = nn.Parameter(spread.expand(num_heads, -1, -1).clone())
            start = start.expand(-1, parabolas) * 2 / parabolas
            count = 2 * parabolas
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, count))
        nn.init.trunc_normal_(self.weight, std=0.02)
        bias = torch.zeros(num_heads, count)
        bias[:, : start.shape[1]] = start.expm1().log()
        self.bias = nn.Parameter(bias)

    def coefficients(self, q_BhNd: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (B, heads, N, 2, 2) and b (B, heads, N, 2) for the queries, such that the bias is -Δᵀ·A·Δ + b·Δ.

        A is symmetric and positive semidefinite; both are float32.
        """
        found = torch.einsum("bhnd,hdm->bhnm", q_BhNd.float(), self.weight.float()) + self.bias.float()[:, None]
        if self.directions is None:
            curvature = F.softplus(found)[..., None] * torch.eye(2, device=found.device)
            return curvature, torch.zeros_like(curvature[..., 0])
        curvatures, slopes = found.chunk(2, dim=-1)
        directions = self.directions.float()
        squares = directions[..., :, None] * directions[..., None, :]  # (heads, parabolas, 2, 2)
        curvature = torch.einsum("bhnm,hmij->bhnij", F.softplus(curvatures), squares)
        return curvature, torch.einsum("bhnm,hmi->bhni", slopes, directions)

    def forward(self, q_BhNd: Tensor, grid: Grid, num_prefix: int) -> Widening:
        """Return the widening for these queries (all or the first few) in their dtype.

        With the positions p of the query and s of the key, -Δᵀ·A·Δ + b·Δ = -sᵀ·A·s + (2·A·p + b)·s - (A·p + b)·p.
        """
        places = centred_coordinates(grid, num_prefix, q_BhNd.device)
        patch, row, column = places.unbind(-1)
        zero = torch.zeros_like(row)
        of_keys = torch.stack((patch, row, column, row * row, 2 * row * column, column * column, zero, zero), dim=-1)
        A, b = self.coefficients(q_BhNd)
        patch, p = places[: q_BhNd.shape[2], :1], places[: q_BhNd.shape[2], 1:]
        Ap = (A * p[:, None]).sum(dim=-1)
        constant = -((Ap + b) * p).sum(dim=-1, keepdim=True)
        squares = torch.stack((A[..., 0, 0], A[..., 0, 1], A[..., 1, 1]), dim=-1)
        of_queries = torch.cat((constant, 2 * Ap + b, -squares, torch.zeros_like(b)), dim=-1) * patch
        # The attention divides by √d, which must not affect the bias.
        scale = q_BhNd.shape[-1] ** 0.5
        return Widening((of_queries * scale).to(q_BhNd.dtype), of_keys[None, None].to(q_BhNd.dtype))


# Turning queries and keys -------------------------------------------------------------------------------------------


class QueryKeyMap(Protocol):
    """A transform of queries (B, heads, N, d; all or the first few) and keys before their products."""

    def queries(self, q_BhNd: Tensor) -> Tensor: ...

    def keys(self, k_BhNd: Tensor) -> Tensor: ...


class Rotation(NamedTuple):
    """cos and sin of each token's angles, (prefix + N, head_dim / 2)."""

    cos: Tensor
    sin: Tensor

    def queries(self, q_BhNd: Tensor) -> Tensor:
        tokens = q_BhNd.shape[2]
        return rotate(q_BhNd, self.cos[:tokens], self.sin[:tokens])

    def keys(self, k_BhNd: Tensor) -> Tensor:
        return rotate(k_BhNd, self.cos, self.sin)


class QueryScale(NamedTuple):
    """A factor for the queries, a scalar tensor."""

    factor: Tensor

    def queries(self, q_BhNd: Tensor) -> Tensor:
        return q_BhNd * self.factor

    def keys(self, k_BhNd: Tensor) -> Tensor:
        return k_BhNd


class LogScale(nn.Module):
    """Scaling of queries by (log(tokens) / log(native tokens))^p.

    It preserves the entropy of the attention at other numbers of tokens (Chiang & Cholak 2022; Su 2021). `kind`
    "fixed": p = 1. "learnt": one exponent for the model, initially 1. "clamped": p = 1, with the scale limited to at
    least 1, so that nothing changes below the native size, and to at most its value at 4 times the native number of
    tokens.
    """

    def __init__(self, native_tokens: int, kind: Literal["fixed", "learnt", "clamped"]) -> None:
        super().__init__()
        self.native_tokens = max(native_tokens, 2)  # log(1) = 0, and attention to one token has no choice
        self.clamped = kind == "clamped"
        self.exponent = nn.Parameter(torch.ones(1)) if kind == "learnt" else None

    def forward(self, tokens_BNC: Tensor) -> QueryScale:
        """Return the scale for this number of tokens, with their dtype and device."""
        # A tensor, not a Python number, which would cause a recompilation for every number of tokens.
        count = torch.full((), tokens_BNC.shape[1], dtype=torch.float32, device=tokens_BNC.device).clamp(min=2)
        factor = count.log() / math.log(self.native_tokens)
        if self.clamped:
            factor = factor.clamp(1, math.log(4 * self.native_tokens) / math.log(self.native_tokens))
        if self.exponent is not None:
            factor = factor ** self.exponent.squeeze()
        return QueryScale(factor.to(tokens_BNC.dtype))


@cached_by_size()
def axial_angles(grid: Grid, head_dim: int, num_prefix: int, base: float, device: torch.device) -> Tensor:
    """Return angles (prefix + h·w, head_dim / 2); each axis has a quarter of the channels, in pairs.

    Coordinates are cell centres in [-1, 1]. Frequencies are 2π / base^(k / (head_dim/4)), k = 0.., so the slowest
    completes only a fraction of a turn across the whole image at any size. Prefix tokens have angle zero, so they are
    not rotated.
    """
    quarter = head_dim // 4
    frequency = 2 * math.pi / base ** (torch.arange(quarter, dtype=torch.float32, device=device) / quarter)

    def axis(length: int) -> Tensor:
        return (2 * torch.arange(length, dtype=torch.float32, device=device) + 1) / length - 1

    h, w = grid
    rows = (axis(h)[:, None] * frequency)[:, None, :].expand(h, w, quarter)
    columns = (axis(w)[:, None] * frequency)[None, :, :].expand(h, w, quarter)
    return F.pad(torch.cat((rows, columns), dim=-1).reshape(h * w, 2 * quarter), (0, 0, num_prefix, 0))


class AxialRotary(nn.Module):
    """Axial rotary position encoding in normalised coordinates; no parameters.

    `jitter` (low, high): in training, the coordinates are multiplied by a factor drawn log-uniformly from this range
    once per forward pass, so that the network sees more scales than its training sizes provide.
    """

    def __init__(
        self,
        head_dim: int,
        num_prefix: int,
        base: float = 100.0,
        jitter: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_multiple(head_dim, 4, "rotary positions (channels per head)")
        self.head_dim = head_dim
        self.num_prefix = num_prefix
        self.base = base
        self.jitter = jitter

    def forward(self, grid: Grid, like: Tensor) -> Rotation:
        """Return the rotation for this grid, with the dtype and device of `like`."""
        angles = axial_angles(grid, self.head_dim, self.num_prefix, self.base, like.device)
        if self.training and self.jitter is not None:
            low, high = math.log(self.jitter[0]), math.log(self.jitter[1])
            angles = angles * torch.empty(1, device=like.device).uniform_(low, high).exp()
        return Rotation(angles.cos().to(like.dtype), angles.sin().to(like.dtype))


def rotate(x_BhNd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels (c, c + d/2) by its token's angle."""
    first, second = x_BhNd.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _check_multiple(value: int, multiple: int, what: str) -> None:
    if value % multiple:
        raise UserError(f"The width {value} does not suit {what}: it must be a multiple of {multiple}.")
