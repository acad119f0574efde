"""RegionViT: one regional token per window of local tokens; regions exchange information, then pass it to the window.

Two maps go through the pyramid: local tokens at strides 4, 8, 16, 32, and one regional token for each window of local
tokens. In a block, the regional tokens first attend to one another over the whole image. Then, with the same weights,
the tokens of each window, including its regional token, attend to one another. Classification reads the regional
tokens, dense tasks the local ones.

Paper: "RegionViT: Regional-to-Local Attention for Vision Transformers", Chen, Panda, Fan, ICLR 2022, arXiv 2106.02689.
Published code and weights: IBM/RegionViT (Apache-2.0).

Any input size: as published with `padding="published"`. If a region (28 or 56 pixels) does not divide both sides, the
regional embedding zero-pads *both* sides at both ends; a side that was divisible gets a whole region of padding. Local
maps are padded at the right and the bottom to the regions' windows in every stage. Masks hide padding except in the
last window, where tokens see padding in their own row or column. With `padding="clean"`, only sides that need it are
padded, at their end, so that regions and windows coincide, and no token sees padding. Both agree if nothing is padded.

Quirks that checkpoints depend on: a window's bias table is stored in wrap-around order, with the zero offset at w // 2;
both maps share the downsampling of a stage, which published files contain twice; the embedding with one convolution
makes one row fewer than others from 4n + 1 pixels; norms before convolutions have eps 1e-5, all others 1e-6.

One file, though long: it covers one paper, with its variants and key map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from timm.layers import DropPath, LayerNorm2d, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.errors import UserError
from anyres.layers.init import init_linear
from anyres.layers.maps import conv_grid, depthwise, on_map, pad_below, with_residual
from anyres.layers.parameter_cache import cached_for_parameter
from anyres.layers.parts import parts_of
from anyres.layers.resample import resample_table
from anyres.layers.size_cache import cached_by_size
from anyres.layers.sizes import crop, is_zero, known, missing, same
from anyres.layers.spatial_reduction import attend
from anyres.layers.windows import merge, partition, window_attention
from anyres.models._backbone import DetectorForm, Family, Variant
from anyres.models._keys import KeyRule
from anyres.models._pyramid import Pyramid, Run, Stage, drop_path_rates
from anyres.options import Count, Depth, PerStage, Rate
from anyres.shapes import Grid

Padding = Literal["published", "clean"]

# Embeddings -----------------------------------------------------------------------------------------------------------


class LocalEmbed(nn.Module):
    """Local tokens at stride 4: three convolutions, or one of 8x8 (section 3.1). (B, H, W, in_chans) → (B, h, w, C)."""

    def __init__(self, in_chans: int, dim: int, depth: int) -> None:
        super().__init__()
        self.proj: nn.Module = nn.Conv2d(in_chans, dim, 8, 4, 3)
        if depth == 3:
            self.proj = nn.Sequential(
                nn.Conv2d(in_chans, dim // 4, 3, 2, 1),
                LayerNorm2d(dim // 4, eps=1e-5),
                nn.GELU(),
                nn.Conv2d(dim // 4, dim // 2, 3, 2, 1),
                LayerNorm2d(dim // 2, eps=1e-5),
                nn.GELU(),
                nn.Conv2d(dim // 2, dim, 3, 1, 1),
            )

    def grid(self, height: int, width: int) -> Grid:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                height, width = conv_grid(layer, height, width)
        return height, width

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return on_map(self.proj, x_BHWC)


def whole_regions(x_BHWC: Tensor, patch: int, clean: bool) -> Tensor:
    """Zero-pad an image to whole regions of `patch` x `patch` pixels; return it unchanged if both sides fit."""
    rows, columns = (missing(side, patch) for side in x_BHWC.shape[1:3])
    if known(rows == 0) and known(columns == 0):
        return x_BHWC
    if clean:
        return pad_below(x_BHWC, rows, columns)
    # A divisible side gets a whole patch if the other side is not divisible.
    rows, columns = (
        extra + patch * is_zero(extra) * (1 - is_zero(other)) for extra, other in ((rows, columns), (columns, rows))
    )
    return F.pad(x_BHWC, (0, 0, columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


class Projection(nn.Module):
    """Downsampling between stages: norm, GELU and a 3x3 convolution of stride 2, with two filters per channel."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim, eps=1e-5)
        self.conv = nn.Conv2d(in_dim, dim, 3, 2, 1, groups=parts_of(dim, in_dim, what="groups"))

    def grid(self, height: int, width: int) -> Grid:
        return conv_grid(self.conv, height, width)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return on_map(self.conv, F.gelu(self.norm(x_BHWC)))


# Windows with a regional token ----------------------------------------------------------------------------------------
#
# A stage works on tokens (B, R, 1 + w·w, C): for each of the R windows, its regional token and then its local tokens,
# row by row. Regions attend to each other without positions, so the windows can have any order. If the local map is
# padded, they are sorted by the mask that they need: windows inside, the last column, the last row, the last window.
# Four masks are then enough for any number of windows. While a graph is captured, whose windows may be symbols in
# number, they stay in row-major order, and each gets a copy of its mask.


@cached_by_size()
def window_order(regions: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the order of the windows by mask, as indices into their row-major order, and its inverse, (R,) each."""
    index = torch.arange(regions[0] * regions[1], device=device).view(regions)
    parts = index[:-1, :-1], index[:-1, -1], index[-1, :-1], index[-1, -1]
    order = torch.cat([part.flatten() for part in parts])
    return order, order.argsort()


def are_sorted(padding: Grid) -> bool:
    """Return whether windows are sorted by mask."""
    return not torch.compiler.is_compiling() and padding != (0, 0)


def mask_number(regions: Grid, device: torch.device) -> Tensor:
    """Return the number (R,) of every window's mask in `padding_masks`, in row-major order."""
    last_row, last_column = (torch.arange(side, device=device) == side - 1 for side in regions)
    return (2 * last_row.long()[:, None] + last_column.long()).flatten()


def to_windows(x_BHWC: Tensor, regional_BhwC: Tensor, window: int) -> tuple[Tensor, Grid]:
    """Local and regional map → tokens (B, R, 1 + w·w, C), and the numbers of padded rows and columns."""
    regions = (regional_BhwC.shape[1], regional_BhwC.shape[2])
    padding = (regions[0] * window - x_BHWC.shape[1], regions[1] * window - x_BHWC.shape[2])
    x_BHWC = pad_below(x_BHWC, *padding)
    local = partition(x_BHWC, (window, window)).unflatten(1, (regions[0] * regions[1], window**2))
    tokens = torch.cat((regional_BhwC.flatten(1, 2)[:, :, None], local), dim=2)
    if are_sorted(padding):
        tokens = tokens[:, window_order(regions, tokens.device)[0]]
    return tokens, padding


def to_maps(t_BRNC: Tensor, regions: Grid, padding: Grid, window: int) -> tuple[Tensor, Tensor]:
    """Tokens of `to_windows` → local map (B, H, W, C) and regional map (B, h, w, C)."""
    if are_sorted(padding):
        t_BRNC = t_BRNC[:, window_order(regions, t_BRNC.device)[1]]
    x_BHWC = merge(t_BRNC[:, :, 1:].flatten(1, 2), (regions[0] * window, regions[1] * window), (window, window))
    x_BHWC = crop(x_BHWC, 1, (x_BHWC.shape[1] - padding[0], x_BHWC.shape[2] - padding[1])).contiguous()
    return x_BHWC, t_BRNC[:, :, 0].unflatten(1, regions)


@cached_by_size()
def wrapped_index(window: int, device: torch.device) -> Tensor:
    """Return indices (w·w, w·w) of (query, key) into a flattened table.

    The index along an axis is the key's offset plus w // 2; negative ones wrap around.
    """
    side = torch.arange(window, device=device)
    cell = (side[None] - side[:, None] + window // 2) % (2 * window - 1)  # (query, key) along one axis
    index = cell[:, None, :, None] * (2 * window - 1) + cell[None, :, None, :]
    return index.reshape(window * window, window * window)


@cached_by_size()
def padding_masks(window: int, padding: Grid, clean: bool, device: torch.device) -> Tensor:
    """Return masks (4, 1 + w·w, 1 + w·w), true where a query may see a key.

    They are for windows inside, in the last column, in the last row, and for the last window.
    """
    side = torch.arange(window, device=device)
    real = (side < window - padding[0])[:, None].expand(window, window), (side < window - padding[1]).expand(window, -1)
    in_row, in_column = (F.pad(axis.flatten(), (1, 0), value=True) for axis in real)  # regional tokens are real in both
    if clean:
        keys = torch.ones_like(in_row), in_column, in_row, in_row & in_column
        return torch.stack([key.expand(len(key), -1) for key in keys])
    row, column = (axis[:, None] & axis for axis in (in_row, in_column))
    return torch.stack((torch.ones_like(row), column, row, row | column))


@cached_for_parameter()
def window_bias(table: Tensor, window: int, padding: Grid, clean: bool) -> Tensor:
    """Return the bias (1, heads, 1 + w·w, 1 + w·w) of a table (heads, (2w-1)²).

    If the local map is padded, there are four of them, each with a padding mask applied.
    """
    bias = F.pad(table[:, wrapped_index(window, table.device)], (1, 0, 1, 0))[None]
    if same(padding, (0, 0)):
        return bias
    # The value is finite in every dtype: a query that sees no key (hidden padding) must not become NaN.
    return bias.masked_fill(~padding_masks(window, padding, clean, table.device)[:, None], -3e4)


class RegionalToLocalAttention(nn.Module):
    """R2L attention (section 3.2), with the same weights for the regional tokens and the windows."""

    def __init__(self, dim: int, num_heads: int, window: int, padding: Padding) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, num_heads)
        self.window = window
        self.clean = padding == "clean"
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos = nn.Parameter(torch.empty(num_heads, (2 * window - 1) ** 2))
        nn.init.trunc_normal_(self.rel_pos, std=0.02)

    def among_regions(self, r_BRC: Tensor) -> Tensor:
        """Regional self-attention without positions: (B, R, C) → (B, R, C)."""
        q, k, v = self.qkv(r_BRC).chunk(3, dim=-1)
        return self.proj(attend(q, k, v, self.num_heads))

    def forward(self, t_BRNC: Tensor, regions: Grid, padding: Grid) -> Tensor:
        """Local self-attention in each window: (B, R, N, C) → the same."""
        bias = window_bias(self.rel_pos, self.window, padding, self.clean)
        if not are_sorted(padding):
            if len(bias) > 1:
                bias = bias[mask_number(regions, bias.device)]
            return self.proj(self.in_windows(self.qkv(t_BRNC), bias))
        h, w = regions
        counts = [(h - 1) * (w - 1), h - 1, w - 1, 1]
        groups = zip(self.qkv(t_BRNC).split(counts, dim=1), bias, strict=True)
        out = [self.in_windows(qkv, mask[None]) for qkv, mask in groups if qkv.shape[1]]
        return self.proj(torch.cat(out, dim=1))

    def in_windows(self, qkv_BRNC: Tensor, bias: Tensor) -> Tensor:
        """(B, R, N, 3·C) → (B, R, N, C), with a bias (1 or R, heads, N, N)."""
        R, N = qkv_BRNC.shape[1:3]
        return window_attention(qkv_BRNC.flatten(1, 2), self.num_heads, N, bias).unflatten(1, (R, N))


class RegionalToLocalBlock(nn.Module):
    """Attention among regions, attention in windows and feed-forward network (equation 1).

    In training, the drop path of the last two acts per region, not per image.
    """

    def __init__(self, dim: int, num_heads: int, window: int, padding: Padding, drop_path: float) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(dim, eps=1e-6)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RegionalToLocalAttention(dim, num_heads, window, padding)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, t_BRNC: Tensor, regions: Grid, padding: Grid) -> Tensor:
        """(B, R, N, C) → the same."""
        r_BRC = t_BRNC[:, :, 0]
        r_BRC = r_BRC + self.drop_path(self.attn.among_regions(self.norm0(r_BRC)))
        t_BRNC = torch.cat((r_BRC[:, :, None], t_BRNC[:, :, 1:]), dim=2)
        t_BRNC = t_BRNC + self.drop_regions(self.attn(self.norm1(t_BRNC), regions, padding))
        return t_BRNC + self.drop_regions(self.mlp(self.norm2(t_BRNC)))

    def drop_regions(self, y_BRNC: Tensor) -> Tensor:
        return self.drop_path(y_BRNC.flatten(0, 1)).view(y_BRNC.shape)


class RegionStage(Stage):
    """Embedding or projection of both maps, then the blocks.

    The first stage makes its regional map from the image with `regional`. `peg` is a conditional position encoding of
    both maps after the first block.
    """

    def __init__(
        self,
        downsample: nn.Module,
        regional: nn.Module | None,
        blocks: Sequence[nn.Module],
        window: int,
        clean: bool,
        peg: nn.Module | None,
        norm: nn.Module | None,
    ) -> None:
        super().__init__(downsample, blocks, norm)
        self.regional = regional
        self.window = window
        self.clean = clean
        self.peg = peg

    def forward(self, x: Tensor, extra: Tensor | None, run: Run) -> tuple[Tensor, Tensor | None]:
        """Image and None, or local and regional map of the previous stage → local and regional map of this stage."""
        return self.mix(*self.enter(x, extra), run)

    def enter(self, x: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embed or downsample the arguments of `forward`: returns both maps at this stage's size."""
        if self.regional is None:
            return self.downsample(x), self.downsample(extra)
        return self.downsample(x), on_map(self.regional, whole_regions(x, 4 * self.window, self.clean))

    def mix(self, x_BHWC: Tensor, r_BhwC: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Run the blocks on both maps."""
        regions = (r_BhwC.shape[1], r_BhwC.shape[2])
        tokens, padding = to_windows(x_BHWC, r_BhwC, self.window)
        for i, block in enumerate(self.blocks):
            if i == 1 and self.peg is not None:
                local, regional = to_maps(tokens, regions, padding, self.window)
                tokens, _ = to_windows(with_residual(self.peg, local), with_residual(self.peg, regional), self.window)
            tokens = run(block, tokens, regions, padding)
        local, regional = to_maps(tokens, regions, padding, self.window)
        return self.norm(local), regional


class RegionViT(Pyramid):
    """RegionViT (section 3).

    The companion of a stage's map is its regional map (B, h, w, C); the head reads that of the last stage. The dense
    form ends every stage with a norm of the local map, which also feeds the next stage.

    Args:
        window: side of a window in local tokens; a regional token covers a square with 4 times this side in pixels.
        stem_depth: number of convolutions in the local embedding, 1 or 3.
        peg: use a conditional position encoding in every stage.
        padding: "published" or "clean"; how sizes that regions do not divide are padded (see the module docstring).
    """

    detector = DetectorForm("detectron2")
    published_keys = (
        KeyRule("^patch_embed", "^stages.0.downsample"),
        KeyRule("^stages.0.downsample.proj.1", "^stages.0.downsample.proj.1", unit_axes="norm"),
        KeyRule("^stages.0.downsample.proj.4", "^stages.0.downsample.proj.4", unit_axes="norm"),
        KeyRule("^cls_token.proj", "^stages.0.regional"),
        KeyRule("^layers.{i}.block.0.proj.0", "^stages.{i}.downsample.norm", unit_axes="norm"),
        KeyRule("^layers.{i}.block.0.proj.2", "^stages.{i}.downsample.conv"),
        KeyRule("^layers.{i}.block.{j+1}", "^stages.{i}.blocks.{j}"),
        KeyRule("^layers.{i}.peg", "^stages.{i}.peg"),
        KeyRule("^norm{i}", "^stages.{i}.norm", unit_axes="norm"),
    )

    def __init__(
        self,
        embed_dims: PerStage[Count] = (64, 128, 256, 512),
        depths: PerStage[Depth] = (2, 2, 8, 2),
        num_heads: PerStage[Count] = (2, 4, 8, 16),
        window: Count = 7,
        stem_depth: Literal[1, 3] = 3,
        peg: bool = False,
        padding: Padding = "published",
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        dense: bool = False,
        **kwargs: Any,
    ) -> None:
        if peg and min(depths) < 2:
            raise UserError(f"depths={tuple(depths)} leave peg=True no place: give every stage at least 2 blocks.")
        rates = drop_path_rates(drop_path_rate, depths)
        stages = [
            RegionStage(
                Projection(embed_dims[i - 1], dim) if i else LocalEmbed(in_chans, dim, stem_depth),
                None if i else nn.Conv2d(in_chans, dim, 4 * window, 4 * window),
                [RegionalToLocalBlock(dim, num_heads[i], window, padding, rate) for rate in rates[i]],
                window,
                padding == "clean",
                depthwise(dim, bias=False) if peg else None,
                nn.LayerNorm(dim, eps=1e-5) if dense else None,
            )
            for i, dim in enumerate(embed_dims)
        ]
        norm = nn.LayerNorm(embed_dims[-1], eps=1e-6)
        super().__init__(stages, embed_dims, norm, in_chans=in_chans, dense=dense, **kwargs)
        self.minimum_size = 1 if stem_depth == 3 else 2
        self.apply(init_linear)

    def finish(self, x_BHWC: Tensor, extra: Tensor | None) -> Tensor:
        """Return normed regional tokens (B, h, w, C)."""
        return self.norm(extra)

    def forward_train(self, x: Tensor, targets: Sequence[str] = ("cls",)) -> dict[str, Tensor]:
        """Return training outputs; "gap" is the mean of the last local map after the final norm."""
        if "gap" not in targets:
            return super().forward_train(x, targets)
        *_, (x_BHWC, regional) = self.forward_stages(x)
        pooled = self.pool(self.finish(x_BHWC, regional))
        logits = self.head(self.head_drop(pooled))
        return {"logits": logits, "cls": pooled, "gap": self.mean_patch(self.norm(x_BHWC))}

    @classmethod
    def from_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the second copy of each projection."""
        return super().from_published({name: tensor for name, tensor in state.items() if ".proj_cls." not in name})

    @classmethod
    def to_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        published = super().to_published(state)
        twice = {name: tensor for name, tensor in published.items() if ".block.0.proj." in name}
        return published | {name.replace(".proj.", ".proj_cls."): tensor for name, tensor in twice.items()}

    def fit_tables(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize weights for another window size bicubically, as in the published converter.

        Bias tables are resized in their wrapped order.
        """
        resized = {}
        for name, ours in self.state_dict().items():
            table = state.get(name)
            if table is None or table.shape == ours.shape:
                continue
            if name == "stages.0.regional.weight":
                resized[name] = resample_table(table, (ours.shape[2], ours.shape[3]))
            elif name.endswith(".rel_pos"):
                old, new = math.isqrt(table.shape[1]), math.isqrt(ours.shape[1])
                if old * old != table.shape[1]:
                    continue
                resized[name] = resample_table(table.unflatten(1, (old, old)), (new, new)).flatten(1)
        return resized


_S = {"embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)}
_M = {**_S, "depths": (2, 2, 14, 2), "stem_depth": 1}
_B = {**_M, "embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}


def _variant(size: str, args: dict[str, Any], top1: float | None = None) -> Variant:
    return Variant(
        published=f"regionvit_{size}",
        args=args,
        drop_path=0.1,
        top1={224: top1} if top1 else {},
        notes="" if top1 else "Published inside detectors only.",
    )


THREE_CONVOLUTIONS = Family(
    model=RegionViT,
    variants={
        "regionvit_tiny": _variant("tiny", {}, 80.4),
        "regionvit_small": _variant("small", _S, 82.6),
        "regionvit_small_w14": _variant("small_w14", {**_S, "window": 14}),
        "regionvit_small_w14_peg": _variant("small_w14_peg", {**_S, "window": 14, "peg": True}),
    },
    paper="RegionViT: Regional-to-Local Attention for Vision Transformers, ICLR 2022, arXiv 2106.02689",
    repository="IBM/RegionViT",
    licence="Apache-2.0",
    size_policy="Any size, as published: the image is zero-padded to whole regions and local maps to whole windows, "
    "with the published masks or clean ones.",
    first_conv="stages.0.downsample.proj.0",
)
ONE_CONVOLUTION = replace(
    THREE_CONVOLUTIONS,
    variants={
        "regionvit_medium": _variant("medium", _M, 83.1),
        "regionvit_base": _variant("base", _B, 83.2),
        "regionvit_base_w14": _variant("base_w14", {**_B, "window": 14}),
        "regionvit_base_w14_peg": _variant("base_w14_peg", {**_B, "window": 14, "peg": True}),
    },
    size_policy="Any size from 2 up, as published: the image is zero-padded to whole regions and local maps to whole "
    "windows, with the published masks or clean ones. A side of 4n + 1 pixels gives n rows of tokens.",
    first_conv="stages.0.downsample.proj",
)
