"""MSG-Transformer: unshifted windows, each with a messenger token; messengers carry information between windows.

Four stages at strides 4, 8, 16, 32. The messenger takes part in the attention of its window. After each attention the
messengers of a region of windows (4x4, 4x4, 2x2, 1x1 by stage) exchange chunks of their channels. This permutation
needs no arithmetic and replaces Swin's shift. The classifier reads the messengers of the last stage.

Paper: "MSG-Transformer: Exchanging Local Spatial Information by Manipulating Messenger Tokens", Fang, Xie, Wang, Zhang,
Liu, Tian, CVPR 2022, arXiv 2105.15168. Published code: hustvl/MSG-Transformer (Apache-2.0), in its revised form of
December 2021; no weights are offered.

Any input size (the published code accepts multiples of 32·M, and returns one row of logits per window of the last
stage). The image is padded at the right and the bottom to a multiple of 4 and each stage's map to whole windows; padded
keys are masked. If a side of the map is below M, the window is cropped to it and uses the small offsets of the bias
table. In a region that the grid of windows cuts short, the chunk for a missing partner stays with its owner. The class
token is the mean of the last stage's normed messengers. The dense form, which has no published code, gives each stage's
map its own norm and drops the messengers.

Quirks that checkpoints depend on: every norm has eps 1e-5; messengers and patches go through the same merging
convolution; the bias of a messenger's own row is stored, although the softmax cancels it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.errors import UserError
from anyres.layers.attention import Block
from anyres.layers.init import init_linear
from anyres.layers.maps import pad_below
from anyres.layers.parameter_cache import cached_for_parameter
from anyres.layers.parts import parts_of
from anyres.layers.patch_embed import ConvEmbed
from anyres.layers.positions import relative_bias
from anyres.layers.resample import resample_table
from anyres.layers.size_cache import cached_by_size
from anyres.layers.sizes import ceil_div, crop
from anyres.layers.windows import (
    PUBLISHED_TABLE,
    cut_window,
    merge,
    padding_mask,
    partition,
    small_offsets,
    window_attention,
)
from anyres.models._backbone import Family, Variant
from anyres.models._keys import KeyRule
from anyres.models._pyramid import Pyramid, Run, Stage, drop_path_rates
from anyres.options import Count, Depth, Factor, PerStage, Rate
from anyres.shapes import Grid


@cached_for_parameter()
def messenger_bias(bias: Tensor, window_size: int, grid: Grid, window: Grid, windows: Grid) -> Tensor:
    """Return the bias (1, heads, 1 + N, 1 + N) among a window's messenger and patches (section 3.2).

    If a map of size `grid` has padding, it is masked and the result is (n, heads, 1 + N, 1 + N). `bias` is that of
    `MessengerAttention`.
    """
    offsets, messenger_key, messenger_query = bias.split(((2 * window_size - 1) ** 2, 1, 1), dim=1)
    patches = relative_bias(small_offsets(offsets.unflatten(1, (2 * window_size - 1, -1)), window), window)
    column = messenger_key[None, :, None].expand(-1, -1, patches.shape[2], 1)
    row = messenger_query[None, :, None].expand(-1, -1, 1, 1 + patches.shape[3])
    whole = torch.cat((row, torch.cat((column, patches), dim=3)), dim=2)
    real_n1N = padding_mask(grid, window, bias.device, windows)
    return (
        whole if real_n1N is None else whole.masked_fill(~F.pad(real_n1N, (1, 0), value=True)[:, None], float("-inf"))
    )


class MessengerAttention(nn.Module):
    """Attention among the messenger and the patches of each window.

    `bias` (heads, (2M-1)² + 2): Swin's table of relative biases row by row, then the bias from patches to the
    messenger, then the bias from the messenger to any token (which the softmax cancels).
    """

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads = parts_of(dim, num_heads)
        self.window_size = window_size
        self.bias = nn.Parameter(torch.empty(num_heads, (2 * window_size - 1) ** 2 + 2))
        nn.init.trunc_normal_(self.bias, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BnNC: Tensor, grid: Grid, window: Grid, windows: Grid) -> Tensor:
        """Windows (B, n, 1 + N, C) of a map of size `grid`, with the messenger first → the same shape."""
        bias = messenger_bias(self.bias, self.window_size, grid, window, windows)
        n, N = x_BnNC.shape[1:3]
        out = window_attention(self.qkv(x_BnNC).flatten(1, 2), self.num_heads, N, bias)
        return self.proj(out.unflatten(1, (n, N)))


@cached_by_size()
def shuffle_order(windows: Grid, region: int, device: torch.device) -> Tensor:
    """Return the source (n·G,) of every chunk, G = region².

    Chunk j of window i comes from chunk i of window j (both numbered row by row inside their region), or stays in place
    if there is no window j.
    """
    rows, columns = torch.arange(windows[0], device=device)[:, None], torch.arange(windows[1], device=device)
    number = (rows % region * region + columns % region)[..., None]
    chunk = torch.arange(region**2, device=device)
    partner_row = (rows - rows % region)[..., None] + chunk // region
    partner_column = (columns - columns % region)[:, None] + chunk % region
    partner = (partner_row * windows[1] + partner_column) * region**2 + number
    own = (rows * windows[1] + columns)[..., None] * region**2 + chunk
    return torch.where((partner_row < windows[0]) & (partner_column < windows[1]), partner, own).flatten()


def shuffle(messengers_BnC: Tensor, windows: Grid, region: int) -> Tensor:
    """Exchange chunks of channels among the messengers of each region of region x region windows (equation 4)."""
    chunks = messengers_BnC.reshape(messengers_BnC.shape[0], -1, messengers_BnC.shape[2] // region**2)
    return chunks.index_select(1, shuffle_order(windows, region, chunks.device)).view(messengers_BnC.shape)


class MessengerBlock(Block):
    """Attention, messenger shuffle and feed-forward network (section 3.2), on windows with the messenger first."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float, region: int) -> None:
        super().__init__(dim, attn, mlp, drop_path, eps=1e-5)
        self.region = region

    def forward(self, x_BnNC: Tensor, grid: Grid, window: Grid, windows: Grid) -> Tensor:
        x_BnNC = x_BnNC + self.drop_path1(self.attn(self.norm1(x_BnNC), grid, window, windows))
        if self.region > 1:  # in place, to avoid copying all patches; nothing else uses the sum
            x_BnNC[:, :, 0] = shuffle(x_BnNC[:, :, 0], windows, self.region)
        return x_BnNC + self.drop_path2(self.mlp(self.norm2(x_BnNC)))


class MessengerStage(Stage):
    """Partition the map into windows once, prepend the messengers, run the blocks, and reassemble the map.

    The map's companion is the map of messengers (B, h', w', C), one for each window. The first stage makes it from
    `msg_tokens` (1, G, 1, C), one vector per position in a region.
    """

    def __init__(
        self, downsample: nn.Module, blocks: Iterable[nn.Module], window_size: int, region: int, first_dim: int | None
    ) -> None:
        super().__init__(downsample, blocks)
        self.window_size = window_size
        self.region = region
        if first_dim is not None:
            self.msg_tokens = nn.Parameter(torch.empty(1, region**2, 1, first_dim))
            nn.init.trunc_normal_(self.msg_tokens, std=0.02)

    def forward(self, x: Tensor, extra: Tensor | None, run: Run) -> tuple[Tensor, Tensor | None]:
        x = self.downsample(x)
        grid = (x.shape[1], x.shape[2])
        window = cut_window(grid, self.window_size)
        if extra is None:
            windows = (ceil_div(grid[0], window[0]), ceil_div(grid[1], window[1]))
            messengers = self.first_messengers(x.shape[0], windows)
        else:  # there is one per window, because ceil(ceil(H / M) / 2) = ceil(ceil(H / 2) / M)
            messengers = self.fewer_messengers(extra)
            windows = (messengers.shape[1], messengers.shape[2])
        patches = partition(x, window, windows=windows).unflatten(1, (windows[0] * windows[1], window[0] * window[1]))
        tokens = torch.cat((messengers.flatten(1, 2)[:, :, None], patches), dim=2)
        for block in self.blocks:
            tokens = run(block, tokens, grid, window, windows)
        return self.norm(merge(tokens[:, :, 1:].flatten(1, 2), grid, window)), tokens[:, :, 0].unflatten(1, windows)

    def fewer_messengers(self, messengers_BhwC: Tensor) -> Tensor:
        """Downsample the messengers of the previous stage.

        While a graph is captured, they get a row and a column of zeros more, as the convolution pads them anyway, and
        the surplus result is dropped: torch makes a graph of its own for a convolution of one row.
        """
        if not torch.compiler.is_compiling():
            return self.downsample(messengers_BhwC)
        h, w = (ceil_div(side, 2) for side in messengers_BhwC.shape[1:3])
        return crop(self.downsample(pad_below(messengers_BhwC, 1, 1)), 1, (h, w))

    def first_messengers(self, batch: int, windows: Grid) -> Tensor:
        """Return the initial messengers (B, h', w', C), the same in every region."""
        region_abC = self.msg_tokens[0, :, 0].unflatten(0, (self.region, self.region))
        rows, columns = (torch.arange(side, device=region_abC.device) % self.region for side in windows)
        return region_abC.index_select(0, rows).index_select(1, columns).expand(batch, -1, -1, -1)


class MSGTransformer(Pyramid):
    """MSG-Transformer (section 3); `window_size` is M, `shuffle_sizes` are the sides of regions in windows."""

    pools = ("token", "avg", "")
    no_decay = ("attn.bias",)
    published_keys = (
        KeyRule("^layers.{i}.blocks", "^stages.{i}.blocks"),
        KeyRule("^layers.{i}.downsample", "^stages.{i+1}.downsample"),
        KeyRule("^stages.{i}.downsample.reduction", "^stages.{i}.downsample.proj"),
        KeyRule("^patch_embed", "^stages.0.downsample"),
        KeyRule("^msg_tokens", "^stages.0.msg_tokens"),
    )
    published_constants = ("relative_position_index",)

    def __init__(
        self,
        embed_dim: Count = 96,
        depths: PerStage[Depth] = (2, 4, 12, 4),
        num_heads: PerStage[Count] = (3, 6, 12, 24),
        window_size: Count = 7,
        shuffle_sizes: PerStage[Count] = (4, 4, 2, 1),
        mlp_ratio: Factor = 4.0,
        in_chans: Count = 3,
        drop_path_rate: Rate = 0.0,
        **kwargs: Any,
    ) -> None:
        widths = [embed_dim * 2**i for i in range(len(depths))]
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, region) in enumerate(zip(widths, shuffle_sizes, strict=True)):
            if dim % region**2:
                raise UserError(
                    f"A width of {dim} cannot be shuffled in regions of {region}x{region} windows: choose a multiple "
                    f"of {region**2}."
                )
            blocks = [
                MessengerBlock(
                    dim,
                    MessengerAttention(dim, num_heads[i], window_size),
                    Mlp(dim, int(dim * mlp_ratio)),
                    rate,
                    region,
                )
                for rate in rates[i]
            ]
            downsample = ConvEmbed(widths[i - 1], dim, 3, 2, 1) if i else ConvEmbed(in_chans, dim, 7, 4, 2, pad=True)
            stages.append(MessengerStage(downsample, blocks, window_size, region, None if i else dim))
        norm, *out_norms = (nn.LayerNorm(dim, eps=1e-5) for dim in (widths[-1], *widths))
        super().__init__(stages, widths, norm, out_norms, in_chans=in_chans, **kwargs)
        self.minimum_size = 1
        self.apply(init_linear)

    def finish(self, x_BHWC: Tensor, extra: Tensor | None) -> Tensor:
        """Return normed tokens (B, 1 + h·w, C), the mean of the messengers first."""
        assert extra is not None
        return torch.cat((self.norm(extra).mean((1, 2))[:, None], self.norm(x_BHWC).flatten(1, 2)), dim=1)

    @classmethod
    def from_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Join the two published bias tensors of an attention, ((2M-1)², heads) and (heads, 2, 1, 1), into one."""
        ours = super().from_published(state)
        for name in [name for name in ours if name.endswith("rel_pos_msg")]:
            stem = name.removesuffix("rel_pos_msg")
            table, messenger = ours.get(stem + PUBLISHED_TABLE), ours[name]
            if table is not None and table.ndim == 2 and messenger.ndim == 4 and table.shape[1] == len(messenger):
                del ours[stem + PUBLISHED_TABLE], ours[name]
                ours[f"{stem}bias"] = torch.cat((table.T, messenger.flatten(1)), dim=1)
        return ours

    @classmethod
    def to_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        published = super().to_published(state)
        for name in [name for name in published if name.endswith("attn.bias")]:
            stem, bias = name.removesuffix("bias"), published.pop(name)
            published[stem + PUBLISHED_TABLE] = bias[:, :-2].T.contiguous()
            published[f"{stem}rel_pos_msg"] = bias[:, -2:, None, None].contiguous()
        return published

    def fit_tables(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize bias tables for another window size bicubically, as in Swin."""
        resized = {}
        for name, parameter in self.named_parameters():
            if name.endswith("attn.bias") and name in state and state[name].shape != parameter.shape:
                lengths = (state[name].shape[1], parameter.shape[1])
                side, own_side = (math.isqrt(max(length - 2, 0)) for length in lengths)
                if not side or side**2 != lengths[0] - 2:
                    continue
                table = resample_table(state[name][:, :-2].unflatten(1, (side, side)), (own_side, own_side))
                resized[name] = torch.cat((table.flatten(1), state[name][:, -2:]), dim=1)
        return resized


VARIANTS = {
    f"msg_transformer_{size}": Variant(
        published=f"msg_{size}_p4_win7_224", args=args, drop_path=drop_path, top1={224: top1}
    )
    for size, args, drop_path, top1 in (
        ("tiny", {"embed_dim": 64, "num_heads": (2, 4, 8, 16)}, 0.1, 82.4),
        ("small", {}, 0.3, 83.4),
        ("base", {"depths": (2, 4, 28, 4)}, 0.5, 84.0),
    )
}
FAMILY = Family(
    model=MSGTransformer,
    variants=VARIANTS,
    paper="MSG-Transformer: Exchanging Local Spatial Information by Manipulating Messenger Tokens, CVPR 2022, "
    "arXiv 2105.15168",
    repository="hustvl/MSG-Transformer",
    licence="Apache-2.0",
    size_policy="Any size: the map of each stage is padded to whole windows with a mask. Messenger tokens without a "
    "partner keep their channels; those of the last stage are averaged.",
    first_conv="stages.0.downsample.proj",
)
