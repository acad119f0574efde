"""MViTv2: a pyramid of global attention whose queries, keys and values are pooled inside every attention.

Four stages at strides 4, 8, 16, 32. A depthwise convolution and a norm pool each of q, k and v: keys and values
strongly, queries only in the first block of a stage. Each logit gets the query's products with a learned vector for its
vertical and one for its horizontal offset (and one for its offset in time), and the pooled query is added to the
attention output. The same block is used for images, detection (windows, and a global block at the end of each stage)
and video.

Paper: "MViTv2: Improved Multiscale Vision Transformers for Classification and Detection", Li, Wu, Fan, Mangalam, Xiong,
Malik, Feichtenhofer, CVPR 2022, arXiv 2112.01526. Published code and weights, all Apache-2.0: facebookresearch/mvit
(images), facebookresearch/detectron2 projects/MViTv2 (detection), facebookresearch/SlowFast (video).

Any input size: grids are halved rounding up, nothing is padded, and the offset tables are resized linearly for each
pair of query and key sides, as in SlowFast and detectron2 (facebookresearch/mvit reads wrong rows at other sizes). In
the dense form, maps are zero-padded to whole windows after the norms and the padding is not masked, as published: a
padded key has the logit 0 plus its bias. Clips (B, C, T, H, W) can have any T.

Quirks that checkpoints depend on: the product q·k is scaled, the bias is not; offsets are computed in float32 and
truncated towards zero; the shortcut of a block that widens comes from the normed tokens; table sizes come from floor
divisions of the native grid while convolutions round up, so some tables are resized even at the native size (312); the
ImageNet-1k L model widens in the feed-forward network, one block earlier than all others. The published models return a
softmax in eval mode; this one returns logits.

One file, though long: it covers one paper, for images and clips, with its variants and key maps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.errors import UserError
from anyres.layers.init import init_linear
from anyres.layers.maps import to_map
from anyres.layers.parameter_cache import cached_for_parameter
from anyres.layers.parts import parts_of
from anyres.layers.patch_embed import ConvEmbed
from anyres.layers.size_cache import cached_by_size
from anyres.layers.sizes import known, larger, regroup
from anyres.layers.windows import merge, partition
from anyres.models._backbone import IMAGENET_MEAN, IMAGENET_STD, DetectorForm, Family, Variant, pair
from anyres.models._keys import KeyRule, Layout
from anyres.models._pyramid import Pyramid, Run, Stage, drop_path_rates
from anyres.options import Count, Depth, PerStage, Rate, SideOrPair

Lengths = tuple[int, ...]
"""Number of tokens along each axis: (h, w), or (t, h, w) for a clip. Tokens (B, prefix + N, C) start with the class
token if prefix is 1."""


def pooled(grid: Lengths, stride: int) -> Lengths:
    """Return the grid after a convolution of this stride: sides round up and time is unchanged."""
    return (*grid[:-2], (grid[-2] - 1) // stride + 1, (grid[-1] - 1) // stride + 1)


def trunc_normal(*shape: int) -> nn.Parameter:
    """Return a parameter initialised as in ViT: truncated normal, σ = 0.02."""
    parameter = nn.Parameter(torch.empty(shape))
    nn.init.trunc_normal_(parameter, std=0.02)
    return parameter


# Decomposed relative position (section 4.1) ---------------------------------------------------------------------------


@cached_by_size()
def offset_index(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the rows (queries, keys) of an axis's table for every pair of positions.

    The row is trunc((i·a - j·b) + (keys - 1)·b) with a = max(keys / queries, 1) and b = max(queries / keys, 1). It is
    computed in float32 and in this order, because other rounding gives other rows if the ratio has no exact float32
    value.
    """
    a, b = (
        (torch.full((), one, dtype=torch.float64, device="cpu") / other).clamp(min=1)
        for one, other in ((keys, queries), (queries, keys))
    )
    first = (b * (keys - 1)).float().to(device)
    i = torch.arange(queries, dtype=torch.float32, device=device)[:, None] * a.float().to(device)
    j = torch.arange(keys, dtype=torch.float32, device=device)[None] * b.float().to(device)
    return (i - j + first).long()


def resize_rows(table: Tensor, rows: int) -> Tensor:
    """Resize a table (L, d) to (rows, d), linearly with half-pixel centres."""
    if known(table.shape[0] == rows):
        return table
    return F.interpolate(table.mT[None], rows, mode="linear")[0].mT


@cached_for_parameter(maximum=4)
def offset_vectors(table: Tensor, queries: int, keys: int) -> Tensor:
    """Return the vector of every pair of positions, (queries, keys, d), from an axis's table (L, d)."""
    return resize_rows(table, 2 * larger(queries, keys) - 1)[offset_index(queries, keys, table.device)]


def offset_products(q_BNhd: Tensor, tables: Sequence[Tensor], grid: Lengths, key_grid: Lengths) -> list[Tensor]:
    """Return, for each axis, the products (B, N, h, keys) of every query with the vectors of all key positions."""
    B, N, heads, dim = q_BNhd.shape
    products = []
    for axis, table in enumerate(tables):
        lines = q_BNhd.reshape(B, math.prod(grid[:axis]), grid[axis], -1, dim)
        product = torch.einsum("bpnad,nkd->bpnak", lines, offset_vectors(table, grid[axis], key_grid[axis]))
        products.append(product.reshape(B, N, heads, -1))
    return products


def bias_mask(products: Sequence[Tensor]) -> Tensor:
    """Return the full bias (B, h, N, M), summed over the axes."""
    mask, *others = (product.transpose(1, 2) for product in products)
    for other in others:
        mask = (mask[..., :, None] + other[..., None, :]).flatten(-2)
    return mask


@cached_by_size()
def key_codes(grid: Lengths, device: torch.device) -> Tensor:
    """Return one-hot codes (M, sum of sides) of every key's position on each axis, which select the bias."""
    positions = torch.meshgrid(*(torch.arange(side, device=device) for side in grid), indexing="ij")
    codes = [
        position.flatten()[:, None] == torch.arange(side, device=device)
        for position, side in zip(positions, grid, strict=True)
    ]
    return torch.cat(codes, dim=1).float()


def bias_channels(
    q_BNhd: Tensor, k_BMhd: Tensor, v_BMhd: Tensor, products: Sequence[Tensor], key_grid: Lengths, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Append channels to q, k and v that add the bias to the logits.

    The extra channels are the products for q, and the position codes for k (times √d, because the attention divides by
    it). Those of v are zero, because fused kernels require equal widths. Prefix rows have zeros, too.
    """
    dim = q_BNhd.shape[-1]
    channels = torch.cat(list(products), dim=-1)
    codes = key_codes(key_grid, k_BMhd.device).to(k_BMhd.dtype)[None, :, None] * math.sqrt(dim)
    codes = codes.expand(k_BMhd.shape[0], -1, k_BMhd.shape[2], -1)
    channels, codes = (F.pad(extra, (0, 0, 0, 0, prefix, 0)) for extra in (channels, codes))
    return (
        torch.cat((q_BNhd, channels), dim=-1),
        torch.cat((k_BMhd, codes), dim=-1),
        F.pad(v_BMhd, (0, codes.shape[-1])),
    )


def biased_attention(
    q_BNhd: Tensor,
    k_BMhd: Tensor,
    v_BMhd: Tensor,
    tables: Sequence[Tensor],
    grid: Lengths,
    key_grid: Lengths,
    prefix: int = 0,
) -> Tensor:
    """Attention with decomposed relative position: softmax(q·k / √d + bias) v, (B, N, h, d).

    The class token's row and column have no bias. Without a class token, the bias is computed in full as a mask, which
    is faster for images. With one, it becomes extra channels, as it is linear in q: the products for q and one-hot
    codes for k. That avoids memory for N·M values and is faster for clips.
    """
    dim = q_BNhd.shape[-1]
    products = offset_products(q_BNhd[:, prefix:], tables, grid, key_grid)
    mask = None
    if prefix:
        q_BNhd, k_BMhd, v_BMhd = bias_channels(q_BNhd, k_BMhd, v_BMhd, products, key_grid, prefix)
    else:
        mask = bias_mask(products)
    q, k, v = (x.transpose(1, 2) for x in (q_BNhd, k_BMhd, v_BMhd))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=dim**-0.5)
    return out.transpose(1, 2)[..., :dim]


# Blocks ---------------------------------------------------------------------------------------------------------------


class HeadPool(nn.Module):
    """Pooling of q, k or v: a depthwise convolution, then a LayerNorm over the channels of a head.

    The convolution is 3 wide on every axis, with padding 1 and no bias. All heads share one set of filters. Time is
    never strided.
    """

    def __init__(self, head_dim: int, stride: int, axes: int) -> None:
        super().__init__()
        self.stride = (*(1,) * (axes - 2), stride, stride)
        self.weight = nn.Parameter(torch.empty(head_dim, 1, *(3,) * axes))
        self.norm = nn.LayerNorm(head_dim, eps=1e-6)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as torch initialises its convolutions

    def forward(self, x_BNC: Tensor, grid: Lengths, prefix: int, heads: int) -> Tensor:
        """(B, prefix + N, C) → (B, prefix + M, heads, d). The class token is only normed."""
        x = x_BNC[:, prefix:].unflatten(1, grid).movedim(-1, 1)
        # Repeating the filters over the heads makes this one depthwise convolution of the channels-last map, with no
        # copy.
        weight = self.weight.expand(heads, *self.weight.shape).flatten(0, 1)
        convolve = F.conv2d if len(grid) == 2 else F.conv3d
        out = convolve(x, weight, None, self.stride, 1, groups=weight.shape[0])
        out = out.movedim(1, -1).flatten(1, -2)
        if prefix:
            out = torch.cat((x_BNC[:, :prefix], out), dim=1)
        return self.norm(out.unflatten(2, (heads, -1)))


class PoolingAttention(nn.Module):
    """Pooling attention with decomposed relative position and residual pooling (sections 3 and 4.1).

    Args:
        tables: number of rows of the offset table of each axis.
        window: side of the windows on the block's input grid; None for global attention.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        num_heads: int,
        stride: int,
        kv_stride: int,
        tables: Sequence[int],
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, num_heads)
        head_dim = dim // num_heads
        self.stride = stride
        self.kv_stride = kv_stride
        self.window = window
        self.qkv = nn.Linear(in_dim, 3 * dim)
        self.pool_q = HeadPool(head_dim, stride, len(tables))
        self.pool_k = HeadPool(head_dim, kv_stride, len(tables))
        self.pool_v = HeadPool(head_dim, kv_stride, len(tables))
        self.axes = "thw"[-len(tables) :]
        for axis, rows in zip(self.axes, tables, strict=True):
            self.register_parameter(f"rel_pos_{axis}", trunc_normal(rows, head_dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BNC: Tensor, grid: Lengths, prefix: int) -> Tensor:
        pools = (self.pool_q, self.pool_k, self.pool_v)
        parts = zip(pools, self.qkv(x_BNC).chunk(3, dim=-1), strict=True)
        q, k, v = (pool(part, grid, prefix, self.num_heads) for pool, part in parts)
        q_grid, k_grid = pooled(grid, self.stride), pooled(grid, self.kv_stride)
        if self.window is not None:
            out = self.in_windows(q, k, v, q_grid, k_grid, self.window)
        else:
            out = self.attend(q, k, v, q_grid, k_grid, prefix)
        residual = F.pad(q[:, prefix:], (0, 0, 0, 0, prefix, 0)) if prefix else q  # without the class token
        return self.proj((out + residual).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Lengths, key_grid: Lengths, prefix: int = 0) -> Tensor:
        tables = [getattr(self, f"rel_pos_{axis}") for axis in self.axes]
        return biased_attention(q, k, v, tables, grid, key_grid, prefix)

    def in_windows(self, q: Tensor, k: Tensor, v: Tensor, grid: Lengths, key_grid: Lengths, side: int) -> Tensor:
        """Attend inside windows with this side on the block's input.

        Each map is zero-padded to whole windows, and padded keys are not masked, as in the published detection code.
        """
        batch, heads = q.shape[0], self.num_heads
        window, key_window = ((side // stride, side // stride) for stride in (self.stride, self.kv_stride))
        q, k, v = (
            partition(x.flatten(2).unflatten(1, sides), cells).reshape(-1, cells[0] * cells[1], *x.shape[2:])
            for x, sides, cells in ((q, grid, window), (k, key_grid, key_window), (v, key_grid, key_window))
        )
        out = self.attend(q, k, v, window, key_window)
        out = merge(out.reshape(batch, -1, heads * out.shape[-1]), (grid[0], grid[1]), window)
        return out.flatten(1, 2).unflatten(2, (heads, -1))


class MultiscaleBlock(nn.Module):
    """x ← shortcut(x) + Attn(LN(x)); x ← shortcut(x) + MLP(LN(x)).

    The shortcut of a branch that changes the width is a projection of the normed tokens. If queries are pooled, the
    shortcut is max-pooled.
    """

    def __init__(self, in_dim: int, dim: int, out_dim: int, attn: PoolingAttention, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim, out_dim)
        self.widens_attention, self.widens_mlp = dim != in_dim, out_dim != dim
        if self.widens_attention or self.widens_mlp:
            self.proj = nn.Linear(in_dim, out_dim)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x_BNC: Tensor, grid: Lengths, prefix: int) -> Tensor:
        normed = self.norm1(x_BNC)
        shortcut = self.proj(normed) if self.widens_attention else x_BNC
        if self.attn.stride > 1:
            shortcut = max_pool(shortcut, grid, prefix)
        x_BNC = shortcut + self.drop_path1(self.attn(normed, grid, prefix))
        normed = self.norm2(x_BNC)
        shortcut = self.proj(normed) if self.widens_mlp else x_BNC
        return shortcut + self.drop_path2(self.mlp(normed))


def max_pool(x_BNC: Tensor, grid: Lengths, prefix: int) -> Tensor:
    """Max-pool each frame's tokens 3x3 with stride 2 and padding 1; the class token is unchanged."""
    B, _, C = x_BNC.shape
    frames = regroup(x_BNC[:, prefix:], B * math.prod(grid[:-2]), *grid[-2:], C)
    out = regroup(to_map(F.max_pool2d(frames.permute(0, 3, 1, 2), 3, 2, 1)), B, -1, C)
    return torch.cat((x_BNC[:, :prefix], out), dim=1) if prefix else out


class ClipEmbed(nn.Module):
    """Patch embedding of clips, (B, T, H, W, C) → (B, ceil(T/2), ceil(H/4), ceil(W/4), C')."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_dim, dim, (3, 7, 7), (2, 4, 4), (1, 3, 3))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // 4), -(-width // 4)

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        return self.proj(x_BTHWC.movedim(-1, 1)).movedim(1, -1).contiguous()


class MultiscaleStage(Stage):
    """The blocks of a stage, which run on tokens.

    The first stage embeds the image and, if `class_token` is not 0, adds a class token of that width. In every other
    stage, the first block pools.
    """

    def __init__(self, embed: nn.Module | None, blocks: Iterable[MultiscaleBlock], class_token: int = 0) -> None:
        super().__init__(nn.Identity() if embed is None else embed, blocks)
        self.cls_token = trunc_normal(1, 1, class_token) if class_token else None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.downsample, nn.Identity):
            return -(-height // 2), -(-width // 2)
        return super().grid(height, width)

    def forward(self, x: Tensor, extra: Tensor | None, run: Run) -> tuple[Tensor, Tensor | None]:
        x = self.downsample(x)
        grid: Lengths = tuple(x.shape[1:-1])
        tokens = x.flatten(1, -2)
        if self.cls_token is not None:
            extra = self.cls_token.expand(x.shape[0], -1, -1)
        prefix = 0 if extra is None else 1
        if extra is not None:
            tokens = torch.cat((extra, tokens), dim=1)
        for block in self.blocks:
            assert isinstance(block, MultiscaleBlock)
            tokens = run(block, tokens, grid, prefix)
            grid = pooled(grid, block.attn.stride)
        return self.norm(tokens[:, prefix:].unflatten(1, grid)), tokens[:, :1] if prefix else None


class MViTv2(Pyramid):
    """MViTv2 for images, or with `num_frames` for clips (B, in_chans, T, H, W), whose maps are (B, C, t, h, w).

    The dense form of an image model has no class token and attends in windows, with a side of `window_size` in the
    first stage and half as large in each following one. The first block of a stage still uses the window size of the
    stage before. The last blocks of stages 2 to 4 are global, with keys and values pooled twice as strongly in stages 2
    and 3. The dense form of a video model is the network without its head.

    Args:
        widen_in_mlp: double the width in the feed-forward network of a stage's last block instead of in the attention
            of the next stage's first block.
        class_token: prepend a class token, which the head reads.
        num_frames: number of frames of the clips that the tables are sized for; None for images.
        kv_stride: stride of keys and values in the first stage; it halves from stage to stage.
    """

    detector = DetectorForm("mvitv2")
    published_keys = (
        KeyRule("^patch_embed", "^stages.0.downsample"),
        KeyRule("^cls_token", "^stages.0.cls_token"),
        KeyRule("^scale{i+2}_norm", "^out_norms.{i}"),
        KeyRule("^head.projection", "^head"),
        KeyRule("norm_q", "pool_q.norm"),
        KeyRule("norm_k", "pool_k.norm"),
        KeyRule("norm_v", "pool_v.norm"),
    )
    layouts = (
        Layout(
            "timm",
            "shortcut_proj_",
            (
                KeyRule("shortcut_proj_attn", "proj"),
                KeyRule("shortcut_proj_mlp", "proj"),
                KeyRule("^head.fc", "^head"),
            ),
        ),
    )

    def __init__(
        self,
        embed_dim: Count = 96,
        depths: PerStage[Depth] = (1, 2, 5, 2),
        num_heads: Count = 1,
        widen_in_mlp: bool = False,
        class_token: bool = False,
        num_frames: Count | None = None,
        kv_stride: Count = 4,
        window_size: Count = 56,
        img_size: SideOrPair = 224,
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        dense: bool = False,
        **kwargs: Any,
    ) -> None:
        windowed = dense and num_frames is None
        if windowed and window_size % max(8, kv_stride):
            raise UserError(
                f"window_size={window_size} cannot be halved three times and pooled: "
                f"choose a multiple of {max(8, kv_stride)}."
            )
        class_token = class_token and not windowed
        embed = ClipEmbed(in_chans, embed_dim) if num_frames else ConvEmbed(in_chans, embed_dim, 7, 4, 3, eps=None)
        rates = drop_path_rates(drop_path_rate, depths)
        frames = () if num_frames is None else (max(num_frames // 2, 1),)
        native = [side // 4 for side in pair(img_size)]
        stages, widths = [], []
        width = embed_dim
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                first, last = j == 0 and i > 0, j == depth - 1
                stride = 2 if first else 1
                key_stride = max(kv_stride >> i, 1) * (2 if windowed and last and i in (1, 2) else 1)
                window = window_size >> (i - first) if windowed and not (last and i) else None
                dim = 2 * width if first and not widen_in_mlp else width
                out_dim = 2 * dim if last and i < 3 and widen_in_mlp else dim
                sides = (*frames, *(max(side // stride, side // key_stride, 1) for side in native))
                tables = [2 * side - 1 for side in sides]
                attn = PoolingAttention(width, dim, num_heads << i, stride, key_stride, tables, window)
                blocks.append(MultiscaleBlock(width, dim, out_dim, attn, rates[i][j]))
                width = out_dim
                native = [side // stride for side in native]
            stages.append(MultiscaleStage(None if i else embed, blocks, 0 if i else class_token * embed_dim))
            widths.append(width)
        self.pools = ("token", "avg", "") if class_token else ("avg", "")
        out_norms = [nn.LayerNorm(width, eps=1e-6) for width in widths] if windowed else None
        norm = nn.LayerNorm(widths[-1], eps=1e-6)
        super().__init__(stages, widths, norm, out_norms, img_size=img_size, in_chans=in_chans, dense=dense, **kwargs)
        self.embed_dim = embed_dim
        self.num_frames = num_frames
        self.num_prefix_tokens = int(class_token)
        self.minimum_size = 1
        self.apply(init_linear)

    def check_size(self, x: Tensor) -> None:
        if self.num_frames is None:
            super().check_size(x)
            return
        self.check_clip(x)
        super().check_size(x[:, :, 0])

    def finish(self, x_BHWC: Tensor, extra: Tensor | None) -> Tensor:
        """Return normed tokens (B, 1 + N, C), the class token first, or the normed map if there is none."""
        if extra is None:
            return self.norm(x_BHWC)
        return self.norm(torch.cat((extra, x_BHWC.flatten(1, -2)), dim=1))

    def fit_tables(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize offset tables stored for another native size, as for another grid."""
        own = {name: tensor.shape for name, tensor in self.state_dict().items() if ".rel_pos_" in name}
        return {
            name: resize_rows(state[name], shape[0])
            for name, shape in own.items()
            if name in state and state[name].shape != shape and state[name].shape[1:] == shape[1:]
        }

    @classmethod
    def from_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename blocks, which published files number through all stages.

        A stage begins where the attention is wider than before. Some files contain image filters with a time axis of
        length 1.
        """
        places: dict[str, str] = {}
        stage = index = width = 0
        while (name := f"blocks.{len(places)}.attn.proj.weight") in state:
            before, width = width, state[name].numel()
            stage, index = (stage + 1, 0) if before and width != before else (stage, index + bool(before))
            places[f"blocks.{len(places)}"] = f"stages.{stage}.blocks.{index}"
        state = {name: x.squeeze(2) if x.ndim == 5 and x.shape[2] == 1 else x for name, x in state.items()}
        return super().from_published(_move_blocks(state, places))

    @classmethod
    def to_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        blocks = {(int(i), int(j)) for name in state for i, j in re.findall(r"^stages\.(\d+)\.blocks\.(\d+)\.", name)}
        places = {f"stages.{i}.blocks.{j}": f"blocks.{number}" for number, (i, j) in enumerate(sorted(blocks))}
        return super().to_published(_move_blocks(state, places))


def _move_blocks(state: dict[str, Tensor], places: dict[str, str]) -> dict[str, Tensor]:
    """Rename blocks: `places` maps old prefixes to new ones."""
    moved = {}
    for name, tensor in state.items():
        match = re.match(r"(?:stages\.\d+\.)?blocks\.\d+(?=\.)", name)
        block = match[0] if match else ""
        moved[places.get(block, block) + name.removeprefix(block)] = tensor
    return moved


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"depths": (1, 2, 11, 2)},
    "base": {"depths": (2, 3, 16, 3)},
    "large": {"embed_dim": 144, "num_heads": 2, "depths": (2, 6, 36, 4)},
    "huge": {"embed_dim": 192, "num_heads": 3, "depths": (4, 8, 60, 8)},
}
IMAGE_VARIANTS = {
    f"mvitv2_{size}": Variant(
        published=f"mvitv2_{size[0]}", args={**_SIZES[size], **args}, drop_path=drop_path, top1={224: top1}, notes=notes
    )
    for size, args, drop_path, top1, notes in (
        ("tiny", {}, 0.1, 82.3, ""),
        ("small", {}, 0.1, 83.6, ""),
        ("base", {}, 0.3, 84.4, "Fine-tuned at 384: 85.2; that file is not published."),
        (
            "large",
            {"widen_in_mlp": True},
            0.5,
            85.3,
            "Fine-tuned at 384: 86.0; that file is not published. The published detector starts from mvitv2_large_cls.",
        ),
    )
}
CLASS_TOKEN_VARIANTS = {
    f"mvitv2_{size}_cls": Variant(
        published=f"mvitv2_{size[0]}_in21k",
        args={**_SIZES[size], "class_token": True, "num_classes": 19168},
        notes=f"Published with a head of 19168 classes (ImageNet-21k, winter 2021).{notes}",
    )
    for size, notes in (
        ("base", ""),
        ("large", " After fine-tuning on ImageNet-1k: 87.5 at 224, 88.4 at 384."),
        ("huge", " After fine-tuning on ImageNet-1k: 88.0 at 224, 88.6 at 384, 88.8 at 512."),
    )
}
VIDEO_VARIANTS = {
    f"mvitv2_{size}_{frames}x{step}": Variant(
        published=f"mvitv2_{size[0]}_{frames}x{step}",
        args={
            **_SIZES[size],
            "class_token": True,
            "num_frames": frames,
            "kv_stride": 8,
            "img_size": side,
            "num_classes": 400,
            "drop_rate": 0.5,
        },
        drop_path=drop_path,
        train_sizes=(side,),
        top1={side: kinetics},
        benchmark="Kinetics-400",
        mean=IMAGENET_MEAN if size == "large" else (0.45, 0.45, 0.45),
        std=IMAGENET_STD if size == "large" else (0.225, 0.225, 0.225),
        notes=f"Clips of {frames} frames, one in {step}. Top-1 is that of {views} views. The network for "
        f"Something-Something v2 (174 classes, channels in reverse order): {something}.",
    )
    for size, frames, step, side, drop_path, kinetics, views, something in (
        ("small", 16, 4, 224, 0.2, 81.0, 5, 68.2),
        ("base", 32, 3, 224, 0.3, 82.9, 5, 70.5),
        ("large", 40, 3, 312, 0.75, 86.1, 15, 73.3),
    )
}

_PAPER = "MViTv2: Improved Multiscale Vision Transformers for Classification and Detection, CVPR 2022, arXiv 2112.01526"
_FIRST_CONV = "stages.0.downsample.proj"
IMAGES = Family(
    model=MViTv2,
    variants=IMAGE_VARIANTS | CLASS_TOKEN_VARIANTS,
    paper=_PAPER,
    repository="facebookresearch/mvit",
    licence="Apache-2.0",
    size_policy="Any size: sizes round up at every stage, and the relative position tables are resized linearly to "
    "each grid. The dense form zero-pads maps to whole windows without a mask, as published.",
    first_conv=_FIRST_CONV,
)
VIDEO = Family(
    model=MViTv2,
    variants=VIDEO_VARIANTS,
    paper=_PAPER,
    repository="facebookresearch/SlowFast",
    licence="Apache-2.0",
    size_policy="Clips of any length and size: sizes round up at every stage, and the relative position tables of "
    "time, height and width are resized linearly to each grid.",
    first_conv=_FIRST_CONV,
)
