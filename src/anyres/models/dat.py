"""DAT: keys and values are sampled from the map at points that the queries shift (deformable attention).

A small network on the queries shifts a regular grid of points, which all queries share; each group of channels has its
own. Features are sampled bilinearly at these points, and a relative bias is sampled from a table at the continuous
displacement between query and point. The other blocks are local: windows and shifted windows in DAT (2022), 7x7
neighbourhoods in DAT++ (2023), which also has convolutions in its stem, reductions and feed-forward networks and before
every block.

Papers: "Vision Transformer with Deformable Attention", Xia, Pan, Song, Li, Huang, CVPR 2022, arXiv 2201.00520; "DAT++:
Spatially Dynamic Vision Transformer with Deformable Attention", the same, arXiv 2309.01430. Published code and weights:
LeapLabTHU/DAT (Apache-2.0): generation 2022 at the tag CVPR2022, generation 2023 at the head of the main branch.

Any input size. The bias table of deformable attention keeps its native size and is sampled at displacements normalised
by the current map, as in the published 2023 code, which runs at any size. The published 2022 code runs only at its
native size and at sizes where the windows divide every map. Here the image is padded to a multiple of 4, odd maps to
even ones, and normed maps to whole windows; padded keys are masked. If `img_size` or `window_size` changes, the tables
are resized bicubically when a checkpoint is loaded, as published for 384. A map with sides below 7 is padded with zeros
that take part in its neighbourhoods, as published. A single pixel or point along a side, for which the published 2023
code divides by zero, is placed at the centre.

Quirks that checkpoints depend on: every norm has eps 1e-5; windows shift by ceil(w/2). The generations share parameter
names but not coordinates. 2022 places queries and points at cell centres, although sampling puts the centres of the
border pixels at -1 and 1; it limits shifts to one cell, and points outside the map read zeros. 2023 places points half
a cell off centre, and clamps them after an unlimited shift.

One file, though long: it covers two papers of one family, DAT and DAT++, with their variants and key maps.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.errors import UserError
from anyres.layers.attention import Block
from anyres.layers.maps import ConvMlp, by_group, depthwise, on_map, pad_to_cell, with_residual
from anyres.layers.parameter_cache import cached_for_parameter
from anyres.layers.parts import parts_of
from anyres.layers.patch_embed import ConvEmbed
from anyres.layers.resample import resample_table
from anyres.layers.size_cache import cached_by_size
from anyres.layers.sizes import at_least_one, ceil_div, crop, is_zero, known, same
from anyres.layers.windows import PUBLISHED_TABLE, WindowAttention, tables_from_published, tables_to_published
from anyres.models._backbone import Family, Variant, pair
from anyres.models._keys import KeyRule
from anyres.models._pyramid import Pyramid, Stage, drop_path_rates
from anyres.options import Count, PerStage, Rate, SideOrPair
from anyres.shapes import Grid

Generation = Literal[2022, 2023]

# Local attention ------------------------------------------------------------------------------------------------------


class LocalAttention(WindowAttention):
    """Attention in windows of `size`x`size` tokens, moved by ceil(size / 2) if `shifted` (first paper, section 3.3)."""

    def __init__(self, dim: int, num_heads: int, size: int, shifted: bool) -> None:
        super().__init__(dim, num_heads, size)
        self.window = (size, size)
        self.shift = (-(-size // 2),) * 2 if shifted else (0, 0)
        nn.init.trunc_normal_(self.bias_table, std=0.01)

    def forward(self, x_BHWC: Tensor) -> Tensor:  # type: ignore[override]
        """(B, H, W, C) → the same."""
        return super().forward(x_BHWC, self.window, self.shift)


NEIGHBOURS = 7


class Tiles(NamedTuple):
    """One axis of a map, cut into tiles of queries; each tile has all the keys that its queries see."""

    keys: Tensor
    """Keys of every tile, (tiles, span)."""
    offset: Tensor
    """Offset of key from query plus 6, in 0 .. 12, (tiles, side, span)."""
    seen: Tensor
    """True if the key is among the query's neighbours, (tiles, side, span)."""


@cached_by_size()
def tiles(length: int, device: torch.device) -> Tiles:
    """Cut an axis into tiles of at most 8 queries (the fastest on a CPU), or 14 if one tile covers the whole axis.

    The last tile is filled up with copies of the last real query. A query's neighbours are the 7 keys around it, or the
    7 nearest at the border, so a tile needs 6 more keys than it has queries. A shorter axis has 7 keys.
    """
    if torch.compiler.is_compiling():
        side, span = 8, 8 + NEIGHBOURS - 1
    else:
        side = length if length <= 14 else ceil_div(length, ceil_div(length, 8))
        span = max(min(side + NEIGHBOURS - 1, length), NEIGHBOURS)
    count = ceil_div(length, side)
    padded = torch.full((), length, device=device).clamp(min=NEIGHBOURS)  # with the keys that fill a neighbourhood
    query = torch.arange(count * side, device=device).clamp(max=length - 1).view(count, side, 1)
    first = (torch.arange(count, device=device) * side - NEIGHBOURS // 2).clamp(min=0)
    keys = torch.minimum(first, (padded - span).clamp(min=0))[:, None] + torch.arange(span, device=device)
    distance = keys[:, None] - torch.minimum((query - NEIGHBOURS // 2).clamp(min=0), padded - NEIGHBOURS)
    offset = keys[:, None] - query + NEIGHBOURS - 1
    return Tiles(
        torch.minimum(keys, padded - 1),
        offset.clamp(0, 2 * NEIGHBOURS - 2),
        (distance >= 0) & (distance < NEIGHBOURS),
    )


@cached_for_parameter(maximum=2)
def neighbourhood_bias(table: Tensor, grid: Grid) -> Tensor:
    """Return the bias (1, heads·tiles, queries per tile, keys per tile), -inf outside each query's neighbourhood.

    The table (heads, 13, 13) is indexed by the offset key minus query.
    """
    rows, columns = (tiles(length, table.device) for length in grid)
    bias = table[:, rows.offset[:, None, :, None, :, None], columns.offset[None, :, None, :, None, :]]
    seen = rows.seen[:, None, :, None, :, None] & columns.seen[None, :, None, :, None, :]
    return bias.masked_fill(~seen, float("-inf")).flatten(5).flatten(3, 4).flatten(0, 2)[None]


class NeighbourhoodAttention(nn.Module):
    """Attention of every query to its 7x7 nearest keys (second paper, section 3.4, after NAT).

    It is computed in tiles: a tile's queries attend to the union of their neighbourhoods, with a mask that limits each
    query to its own.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * NEIGHBOURS - 1, 2 * NEIGHBOURS - 1))
        nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) → the same."""
        H, W = x_BHWC.shape[1:3]
        return self.proj(self.attend(self.qkv(pad_to_cell(x_BHWC, NEIGHBOURS)), (H, W)))

    def attend(self, qkv_BHWC: Tensor, grid: Grid) -> Tensor:
        """(B, at least H, at least W, 3·C), ordered [q | k | v] and head-major, → (B, H, W, C), the size of `grid`.

        Positions outside the grid are keys only, and only if the grid is smaller than a neighbourhood.
        """
        (H, W), (B, rows_held, columns_held) = grid, qkv_BHWC.shape[:3]
        rows, columns = tiles(H, qkv_BHWC.device), tiles(W, qkv_BHWC.device)
        (n, t), (m, s) = rows.offset.shape[:2], columns.offset.shape[:2]
        q_BHWC, kv_BHWC = qkv_BHWC.tensor_split((qkv_BHWC.shape[-1] // 3,), dim=-1)
        # Tiles go into the head axis, not the batch axis, so that one mask serves all images without a copy.
        q_BHWC = F.pad(crop(q_BHWC, 1, grid), (0, 0, 0, m * s - W, 0, n * t - H))
        q = q_BHWC.reshape(B, n, t, m, s, self.num_heads, -1).permute(0, 5, 1, 3, 2, 4, 6)
        kv = kv_BHWC.reshape(B, rows_held * columns_held, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if not (known(n * m == 1) and same((rows_held, columns_held), (rows.keys.shape[1], columns.keys.shape[1]))):
            index = rows.keys[:, None, :, None] * columns_held + columns.keys[None, :, None, :]
            kv = kv.contiguous().index_select(3, index.flatten())
        k, v = kv.unflatten(3, (n * m, -1)).flatten(2, 3)
        mask = neighbourhood_bias(self.rpb, (H, W)).to(q.dtype)
        out = F.scaled_dot_product_attention(q.flatten(4, 5).flatten(1, 3), k, v, attn_mask=mask)
        out = out.view(B, self.num_heads, n, m, t, s, -1).permute(0, 2, 4, 3, 5, 1, 6)
        return crop(out.reshape(B, n * t, m * s, -1), 1, grid)


# Deformable attention -------------------------------------------------------------------------------------------------


def positions(length: int, start: float, steps: int, like: Tensor) -> Tensor:
    """Return (i + start) / steps for i < length, scaled from [0, 1] to [-1, 1]; the centre, 0, if `steps` is 0."""
    place = (torch.arange(length, device=like.device, dtype=like.dtype) + start) / at_least_one(steps) * 2 - 1
    return place if known(steps > 0) else place * (1 - is_zero(steps))


class DeformableAttention(nn.Module):
    """Deformable multi-head attention (first paper, section 3.2) of generation 2022, with positions (y, x) in [-1, 1].

    Each of the `groups` has its own points; groups and heads are contiguous ranges of channels. `native` is the size of
    the map that the bias table (heads, 2h-1, 2w-1) was made for.
    """

    def __init__(self, dim: int, num_heads: int, groups: int, kernel: int, stride: int, native: Grid) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, num_heads)
        self.groups = parts_of(self.num_heads, groups, "heads", "groups")
        self.proj_q = nn.Linear(dim, dim)
        self.proj_k = nn.Linear(dim, dim)
        self.proj_v = nn.Linear(dim, dim)
        self.proj_out = nn.Linear(dim, dim)
        self.offset_conv = depthwise(dim // groups, kernel, stride)
        self.offset_norm = nn.LayerNorm(dim // groups, eps=1e-5)
        self.offset_proj = nn.Linear(dim // groups, 2, bias=False)
        self.rpe_table = nn.Parameter(torch.empty(num_heads, 2 * native[0] - 1, 2 * native[1] - 1))
        nn.init.trunc_normal_(self.rpe_table, std=0.01)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) → the same."""
        q_BHWC = self.proj_q(x_BHWC)
        points = self.points(self.offsets(q_BHWC))
        sampled_BMC = self.sample(x_BHWC, points)
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in (q_BHWC.flatten(1, 2), self.proj_k(sampled_BMC), self.proj_v(sampled_BMC))
        )
        bias = self.bias((x_BHWC.shape[1], x_BHWC.shape[2]), points).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj_out(out.transpose(1, 2).reshape(x_BHWC.shape))

    def offsets(self, q_BHWC: Tensor) -> Tensor:
        """Queries → raw offsets (B, G, h, w, 2) of h·w points, in float32 or wider; the groups share the network."""
        y_BhwC = on_map(self.offset_conv, by_group(q_BHWC, self.groups))
        raw = self.offset_proj(F.gelu(self.offset_norm(y_BhwC))).unflatten(0, (-1, self.groups))
        return raw.to(torch.promote_types(raw.dtype, torch.float32))

    def points(self, raw_BGhw2: Tensor) -> Tensor:
        """Raw offsets → positions (B, G, M, 2) of M = h·w points."""
        h, w = raw_BGhw2.shape[2:4]
        raw_y, raw_x = raw_BGhw2.unbind(-1)
        y = self.place(self.references(h, raw_y)[:, None], raw_y, h)
        x = self.place(self.references(w, raw_x), raw_x, w)
        return torch.stack((y, x), dim=-1).flatten(2, 3)

    def references(self, length: int, like: Tensor) -> Tensor:
        """Return the positions of `length` points along an axis before they are shifted: the centres of cells."""
        return positions(length, 0.5, length, like)

    def queries(self, length: int, like: Tensor) -> Tensor:
        """Return the positions of `length` queries along an axis: the centres of cells."""
        return positions(length, 0.5, length, like)

    def place(self, reference: Tensor, raw: Tensor, length: int) -> Tensor:
        """Shift points along an axis by at most one cell."""
        return reference + raw.tanh() * 2 / length

    def sample(self, x_BHWC: Tensor, points_BGM2: Tensor) -> Tensor:
        """Sample features (B, M, C) bilinearly at each group's points, with zeros outside the map."""
        B, _, M, _ = points_BGM2.shape
        maps = x_BHWC.to(points_BGM2.dtype).unflatten(3, (self.groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
        sampled = F.grid_sample(maps, points_BGM2.flip(-1).flatten(0, 1)[:, None], align_corners=True)
        return sampled.view(B, -1, M).transpose(1, 2).to(x_BHWC.dtype)

    def bias(self, grid: Grid, points_BGM2: Tensor) -> Tensor:
        """Sample the bias (B, heads, H·W, M) bilinearly from the table at half the displacement from point to query.

        The sampling is separable (bias = A_y · table · A_xᵀ for each point, with two-tap interpolation matrices), but
        on a CPU these products took two to four times as long as sampling in two dimensions.
        """
        y, x = points_BGM2[:, :, None, None].unbind(-1)
        y = (self.queries(grid[0], y)[:, None, None] - y) / 2
        x = (self.queries(grid[1], x)[:, None] - x) / 2
        displacement = torch.stack(torch.broadcast_tensors(x, y), dim=-1).flatten(2, 3).flatten(0, 1)
        table = self.rpe_table.to(y.dtype).unflatten(0, (self.groups, -1)).expand(y.shape[0], -1, -1, -1, -1)
        bias = F.grid_sample(table.flatten(0, 1), displacement, align_corners=True)
        return bias.unflatten(0, (-1, self.groups)).flatten(1, 2)


class ClampedDeformableAttention(DeformableAttention):
    """Deformable attention of generation 2023: other coordinates, unlimited offsets, points clamped to the map."""

    def references(self, length: int, like: Tensor) -> Tensor:
        """Return positions half a step off centre; the last point lies outside the map until it is clamped."""
        return positions(length, 0.5, length - 1, like)

    def queries(self, length: int, like: Tensor) -> Tensor:
        """Return the centres of pixels as sampling counts them, with those of the border pixels at -1 and 1."""
        return positions(length, 0, length - 1, like)

    def place(self, reference: Tensor, raw: Tensor, length: int) -> Tensor:
        return (reference + raw).clamp(-1, 1)


# The network ----------------------------------------------------------------------------------------------------------


class DATBlock(Block):
    """Local perception unit (generation 2023), attention and feed-forward network."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float, perception: bool) -> None:
        super().__init__(dim, attn, mlp, drop_path, eps=1e-5)
        self.perception = depthwise(dim) if perception else None

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        return super().forward(x if self.perception is None else with_residual(self.perception, x), *context)


class ConvStem(ConvEmbed):
    """The stem of DAT++: two strided convolutions, each with a norm, and a GELU between them."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(in_dim, dim // 2, 3, 2, 1)
        self.second = ConvEmbed(dim // 2, dim, 3, 2, 1)

    def grid(self, height: int, width: int) -> Grid:
        return self.second.grid(*super().grid(height, width))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.second(F.gelu(super().forward(x_BHWC)))


_WINDOW_LAYERS = {"proj_qkv": "qkv", "proj_out": "proj"}


def rename_window_layers(state: dict[str, Tensor], table: str, names: dict[str, str]) -> dict[str, Tensor]:
    """Rename layers of window attention by `names`.

    Window attention is recognised by its `table`, because deformable attention also has a `proj_out`, which is a 1x1
    convolution.
    """
    windows = {name.rpartition(".")[0] for name in state if name.endswith(f".{table}")}

    def renamed(name: str) -> str:
        parent, layer, kind = ["", "", *name.rsplit(".", 2)][-3:]
        return f"{parent}.{names[layer]}.{kind}" if parent in windows and layer in names else name

    return {renamed(name): tensor for name, tensor in state.items()}


class DAT(Pyramid):
    """DAT and DAT++.

    Args:
        blocks: the attention of every block, one string per stage: L for windows, S for shifted windows, N for
            neighbourhoods, D for deformable attention.
        groups: number of groups in each stage's D blocks.
        window_size: side of the windows of L and S.
        generation: 2022 or 2023; sets how D blocks place queries and points and how many points they use: one per query
            (2022), or one per 64, 16, 4 and 1 queries in the four stages (2023).
        convolutional: use the overlapping convolutions of DAT++ in the stem, reductions and feed-forward networks, and
            its local perception unit before every block.
    """

    no_decay = ("bias_table", "rpe_table")
    published_keys = (
        KeyRule("^down_projs.{i}.0", "^stages.{i+1}.downsample.proj"),
        KeyRule("^down_projs.{i}.1.norm", "^stages.{i+1}.downsample.norm"),
        KeyRule("^patch_proj.0", "^stages.0.downsample.proj"),
        KeyRule("^patch_proj.1.norm", "^stages.0.downsample.norm"),
        KeyRule("^patch_proj.3", "^stages.0.downsample.second.proj"),
        KeyRule("^patch_proj.4.norm", "^stages.0.downsample.second.norm"),
        *(
            KeyRule(f"^stages.{{i}}.layer_norms.{2 * j + k}.norm", f"^stages.{{i}}.blocks.{j}.norm{k + 1}")
            for j in range(18)
            for k in range(2)
        ),
        KeyRule("^stages.{i}.local_perception_units.{j}", "^stages.{i}.blocks.{j}.perception"),
        KeyRule("^stages.{i}.mlps.{j}.chunk.linear1", "^stages.{i}.blocks.{j}.mlp.0"),
        KeyRule("^stages.{i}.mlps.{j}.chunk.linear2", "^stages.{i}.blocks.{j}.mlp.2"),
        KeyRule("^stages.{i}.mlps.{j}.linear1.0", "^stages.{i}.blocks.{j}.mlp.fc1", "conv"),
        KeyRule("^stages.{i}.mlps.{j}.dwc", "^stages.{i}.blocks.{j}.mlp.dwconv"),
        KeyRule("^stages.{i}.mlps.{j}.linear2.0", "^stages.{i}.blocks.{j}.mlp.fc2", "conv"),
        KeyRule("^stages.{i}.attns.{j}", "^stages.{i}.blocks.{j}.attn"),
        *(KeyRule(f"proj_{part}", f"proj_{part}", "conv") for part in ("q", "k", "v", "out")),
        KeyRule("conv_offset.0", "offset_conv"),
        KeyRule("conv_offset.1.norm", "offset_norm"),
        KeyRule("conv_offset.3", "offset_proj", "conv"),
        KeyRule("^norms.{i}.norm", "^out_norms.{i}"),
        KeyRule("^cls_norm.norm", "^norm"),
        KeyRule("^cls_head", "^head"),
    )
    published_constants = ("relative_position_index", "attn_mask")

    def __init__(
        self,
        embed_dims: PerStage[Count] = (96, 192, 384, 768),
        blocks: PerStage[str] = ("LS", "LS", "LDLDLD", "LD"),
        num_heads: PerStage[Count] = (3, 6, 12, 24),
        groups: PerStage[Count] = (1, 1, 3, 6),
        window_size: Count = 7,
        generation: Generation = 2022,
        convolutional: bool = False,
        img_size: SideOrPair = 224,
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        **kwargs: Any,
    ) -> None:
        def enter(i: int) -> ConvEmbed:
            dim = embed_dims[i]
            if i == 0:
                return ConvStem(in_chans, dim) if convolutional else ConvEmbed(in_chans, dim, 4, 4, pad=True)
            if convolutional:
                return ConvEmbed(embed_dims[i - 1], dim, 3, 2, 1, bias=False)
            return ConvEmbed(embed_dims[i - 1], dim, 2, 2, bias=False, pad=True)

        def attention(i: int, letter: str, native: Grid) -> nn.Module:
            dim, heads = embed_dims[i], num_heads[i]
            match letter:
                case "L" | "S":
                    return LocalAttention(dim, heads, window_size, shifted=letter == "S")
                case "N":
                    return NeighbourhoodAttention(dim, heads)
                case "D":
                    kernel = (9, 7, 5, 3)[i]
                    if generation == 2022:
                        return DeformableAttention(dim, heads, groups[i], kernel, 1, native)
                    return ClampedDeformableAttention(dim, heads, groups[i], kernel, (8, 4, 2, 1)[i], native)
            raise UserError(f"A block {letter!r} does not exist: choose L, S, N or D.")

        def feed_forward(dim: int) -> nn.Module:
            if convolutional:
                return ConvMlp(dim, 4 * dim, residual=True)
            return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

        rates = drop_path_rates(drop_path_rate, [len(letters) for letters in blocks])
        native = pair(img_size)
        stages = []
        for i, dim in enumerate(embed_dims):
            downsample = enter(i)
            native = downsample.grid(*native)
            stages.append(
                Stage(
                    downsample,
                    [
                        DATBlock(dim, attention(i, letter, native), feed_forward(dim), rate, convolutional)
                        for letter, rate in zip(blocks[i], rates[i], strict=True)
                    ],
                )
            )
        norm, *out_norms = (nn.LayerNorm(dim, eps=1e-5) for dim in (embed_dims[-1], *embed_dims))
        super().__init__(stages, embed_dims, norm, out_norms, img_size=img_size, in_chans=in_chans, **kwargs)
        self.minimum_size = 1

    @classmethod
    def from_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = rename_window_layers(state, PUBLISHED_TABLE, _WINDOW_LAYERS)
        return super().from_published(tables_from_published(state))

    @classmethod
    def to_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {ours: published for published, ours in _WINDOW_LAYERS.items()}
        return tables_to_published(rename_window_layers(super().to_published(state), "bias_table", names))

    def fit_tables(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize both kinds of tables bicubically from another window or native size."""
        return {
            name: resample_table(state[name], (parameter.shape[1], parameter.shape[2]))
            for name, parameter in self.named_parameters()
            if name.endswith(("bias_table", "rpe_table")) and name in state and state[name].shape != parameter.shape
        }


_DEEP: dict[str, Any] = {"blocks": ("LS", "LS", "LD" * 9, "LD")}
_WIDE: dict[str, Any] = {"embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_BASE: dict[str, Any] = {**_DEEP, **_WIDE, "groups": (1, 1, 4, 8)}
VARIANTS = {
    "dat_tiny": Variant("dat_tiny", {}, 0.2, {224: 82.0}),
    "dat_small": Variant("dat_small", _DEEP, 0.3, {224: 83.7}),
    "dat_base": Variant("dat_base", _BASE, 0.5, {224: 84.0}),
    "dat_base_384": Variant(
        "dat_base_384",
        {**_BASE, "window_size": 12, "img_size": 384},
        0.5,
        {384: 84.8},
        (384,),
        crop_pct=1.0,
        notes="Fine-tuned from dat_base, whose bias tables are resized bicubically when they are loaded.",
    ),
}

_PLUS: dict[str, Any] = {"blocks": ("ND", "ND" * 2, "ND" * 9, "DD"), "generation": 2023}
_PLUS_TINY: dict[str, Any] = {
    **_PLUS,
    "embed_dims": (64, 128, 256, 512),
    "num_heads": (2, 4, 8, 16),
    "groups": (1, 2, 4, 8),
}
_PLUS_BASE: dict[str, Any] = {**_PLUS, **_WIDE, "groups": (2, 4, 8, 16), "convolutional": True}
PLUS_VARIANTS = {
    "dat_pp_tiny": Variant("dat_pp_tiny", {**_PLUS_TINY, "convolutional": True}, 0.2, {224: 83.9}),
    "dat_pp_small": Variant("dat_pp_small", {**_PLUS, "groups": (1, 2, 3, 6), "convolutional": True}, 0.4, {224: 84.6}),
    "dat_pp_base": Variant("dat_pp_base", _PLUS_BASE, 0.7, {224: 84.9}),
    "dat_pp_base_384": Variant(
        "dat_pp_base_384",
        _PLUS_BASE,
        0.6,
        {384: 85.9},
        (384,),
        crop_pct=1.0,
        notes="Fine-tuned from dat_pp_base; the bias tables keep their native size 224.",
    ),
    "dat_plus": Variant("dat_p", _PLUS_TINY, 0.2, notes="Ablation of dat_pp_tiny: `convolutional` is off."),
}

_PUBLISHED: dict[str, Any] = {
    "model": DAT,
    "repository": "LeapLabTHU/DAT",
    "licence": "Apache-2.0",
    "first_conv": "stages.0.downsample.proj",
}
FAMILY = Family(
    variants=VARIANTS,
    paper="Vision Transformer with Deformable Attention, CVPR 2022, arXiv 2201.00520",
    size_policy="Any size: the image is padded to a multiple of 4, odd-sized maps to even ones, and normalised maps to "
    "whole windows, with a mask. Bias tables keep their native size and are sampled at normalised displacements.",
    **_PUBLISHED,
)
PLUS_FAMILY = Family(
    variants=PLUS_VARIANTS,
    paper="DAT++: Spatially Dynamic Vision Transformer with Deformable Attention, 2023, arXiv 2309.01430",
    size_policy="Any size, as published: sizes round up at every stage, and maps below 7 are zero-padded for the "
    "neighbourhoods. Bias tables are sampled at normalised displacements.",
    **_PUBLISHED,
)
