"""GPViT: a plain high-resolution transformer that exchanges global information through a few group tokens.

All twelve layers have stride 8 and the same width. Local layers attend inside stripes two lines wide, in two
directions. Every third layer is a propagation layer: learned group tokens gather information from all tokens, mix it
among themselves and pass it back. Each layer ends with a depthwise 3x3 convolution.

Paper: "GPViT: A High Resolution Non-Hierarchical Vision Transformer with Group Propagation", Yang, Xu, De Mello,
Crowley, Wang, ICLR 2023, arXiv 2212.06795. Published code and weights: ChenhongyiYang/GPViT (Apache-2.0).

Any input size: the stem pads its map at the right and the bottom to whole patches, and the position table is resized
bicubically. The published code requires grids with even sides; here the last stripe of an odd side is one line wide.
`dense=True` is the segmentation backbone (four maps of stride 8, each with its own norm); `adapter=True` is the
detection backbone (maps of strides 4, 8, 16, 32 without a final norm), which pads images to multiples of 32, as the
published pipeline does, and crops its maps.

Quirks that checkpoints depend on: the norms of local layers and the last norm have eps 1e-6, those of propagation
layers and the pooling 1e-5; gathering has no residual and does not project queries, values or the result; a propagation
layer concatenates instead of adding; the convolution at the end of a layer has no residual; the mixer's hidden size
depends on the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from anyres.errors import UserError
from anyres.layers.adapter import Adapter
from anyres.layers.attention import Block
from anyres.layers.init import init_linear
from anyres.layers.maps import ConvNorm, depthwise, on_map, pad_to_multiple, to_map, to_nchw
from anyres.layers.patch_embed import patches_of
from anyres.layers.spatial_reduction import attend
from anyres.layers.stripes import StripeAttention
from anyres.models._backbone import DetectorForm, Family, Variant, take_indices
from anyres.models._keys import KeyRule
from anyres.models._plain import Plain
from anyres.options import Count, Depth, Factor, Rate, SideOrPair, WholeNumber
from anyres.shapes import Grid

GROUP_HEADS = 6
"""Number of heads in all attention with group tokens."""


class ConvStem(nn.Module):
    """7x7 convolution of stride 2, `extra` 3x3 convolutions, then 4x4 patches: (B, in_chans, H, W) → (B, dim, h, w).

    The map after the convolutions is zero-padded to whole patches.
    """

    patch_size = 8

    def __init__(self, in_chans: int, dim: int, extra: int, width: int = 64) -> None:
        super().__init__()
        self.stem = ConvNorm(in_chans, width, 7, 2)
        self.extra = nn.ModuleList(ConvNorm(width, width, 3) for _ in range(extra))
        self.projection = nn.Conv2d(width, dim, 4, 4)

    def grid(self, height: int, width: int) -> Grid:
        return patches_of(height, width, self.patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.stem(to_map(x_BCHW)).relu()
        for conv in self.extra:
            x = conv(x).relu()
        return self.projection(to_nchw(pad_to_multiple(x, 4)))


class LocalLayer(Block):
    """Attention in stripes of two lines and a feed-forward network, then a depthwise convolution (section 3.3)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__(dim, StripeAttention(dim, num_heads, width=2), Mlp(dim, int(dim * mlp_ratio)), drop_path)
        self.dw = depthwise(dim, bias=False)

    def forward(self, x_BNC: Tensor, grid: Grid, *_: Any) -> Tensor:
        return on_map(self.dw, super().forward(x_BNC.unflatten(1, grid))).flatten(1, 2)


class Grouping(nn.Module):
    """Learned group tokens attend to all tokens (section 3.2), (B, N, C) → (B, M, C).

    The result is softmax(LN(G)·K(u)ᵀ)·u with group tokens G and u = LN(x). The classifier's pooling has one token and
    no norm, and its keys have no bias (section 3.4).
    """

    def __init__(self, dim: int, tokens: int, pooling: bool = False) -> None:
        super().__init__()
        self.group_token = nn.Parameter(torch.zeros(1, tokens, dim))
        self.norm_query = nn.LayerNorm(dim)
        self.norm_key = nn.Identity() if pooling else nn.LayerNorm(dim)
        self.k_proj = nn.Linear(dim, dim, bias=not pooling)
        if not pooling:
            nn.init.trunc_normal_(self.group_token, std=0.02)
        init_linear(self.k_proj)

    def forward(self, x_BNC: Tensor) -> Tensor:
        u = self.norm_key(x_BNC)
        queries = self.norm_query(self.group_token).expand(u.shape[0], -1, -1)
        return attend(queries, self.k_proj(u), u, GROUP_HEADS)


class Mixer(nn.Module):
    """One layer of MLP-Mixer, over tokens, then over channels, in which group tokens exchange information."""

    def __init__(self, dim: int, tokens: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.token_mlp = Mlp(tokens, dim // 2, tokens)
        self.norm2 = nn.LayerNorm(dim)
        self.channel_mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, g_BMC: Tensor) -> Tensor:
        g_BMC = g_BMC + self.drop_path1(self.token_mlp(self.norm1(g_BMC).transpose(1, 2)).transpose(1, 2))
        return g_BMC + self.drop_path2(self.channel_mlp(self.norm2(g_BMC)))


class CrossAttention(nn.Module):
    """Tokens attend to group tokens: (B, N, C), (B, M, C) → (B, N, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BNC: Tensor, g_BMC: Tensor) -> Tensor:
        return self.proj(attend(self.q_proj(x_BNC), self.k_proj(g_BMC), self.v_proj(g_BMC), GROUP_HEADS))


class Ungrouping(nn.Module):
    """Tokens read from the group tokens: z = W·[x, attention(LN(x), LN(g))]; z ← z + FFN(LN(z)) (section 3.2)."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm_query = nn.LayerNorm(dim)
        self.norm_key = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim)
        self.proj = nn.Linear(2 * dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x_BNC: Tensor, g_BMC: Tensor) -> Tensor:
        update = self.drop_path1(self.attn(self.norm_query(x_BNC), self.norm_key(g_BMC)))
        z = self.proj(torch.cat((x_BNC, update), dim=-1))
        return z + self.drop_path2(self.mlp(self.norm2(z)))


class PropagationLayer(nn.Module):
    """Group propagation (section 3.2), then a depthwise convolution with batch norm and ReLU."""

    def __init__(self, dim: int, tokens: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.group = Grouping(dim, tokens)
        self.mixer = Mixer(dim, tokens, mlp_ratio, drop_path)
        self.ungroup = Ungrouping(dim, mlp_ratio, drop_path)
        self.dw = ConvNorm(dim, dim, 3, groups=dim)

    def forward(self, x_BNC: Tensor, grid: Grid, *_: Any) -> Tensor:
        x_BNC = self.ungroup(x_BNC, self.mixer(self.group(x_BNC)))
        return self.dw(x_BNC.unflatten(1, grid)).relu().flatten(1, 2)


class GPViT(Plain):
    """GPViT: a local, a propagation and a local layer, four times (section 3.4).

    Args:
        group_tokens: number of group tokens in each propagation layer (layers 1, 4, 7, …).
        stem_convs: number of extra convolutions in the stem.
        global_pool: "group" (attention pooling by one learned token), "avg" or "".
        adapter: use the dense form for detection instead of the one for segmentation.
        finest: stride of the adapter's first map, 4 or 8 (RetinaNet).
    """

    detector = DetectorForm("gpvit", "maps", "pyramid")
    pools = ("group", "avg", "")
    published_keys = (
        KeyRule("^pos_embed", "^position.table"),
        KeyRule("^patch_embed.stem.0", "^patch_embed.stem.conv"),
        KeyRule("^patch_embed.stem.1", "^patch_embed.stem.norm"),
        *(KeyRule(f"^patch_embed.convs.{3 * i}", f"^patch_embed.extra.{i}.conv") for i in range(2)),
        *(KeyRule(f"^patch_embed.convs.{3 * i + 1}", f"^patch_embed.extra.{i}.norm") for i in range(2)),
        KeyRule("^layers.{i}", "^blocks.{i}"),
        KeyRule("^blocks.{i}.qkv", "^blocks.{i}.attn.qkv"),
        KeyRule("^blocks.{i}.proj", "^blocks.{i}.attn.proj"),
        KeyRule("attns.{j}.get_v", "attn.lepe.{j}"),
        KeyRule("group_layer", "group"),
        KeyRule("group.attn.k_proj", "group.k_proj"),
        KeyRule("^blocks.{i}.group_token", "^blocks.{i}.group.group_token"),
        KeyRule("mixer.layers.0", "mixer"),
        *(
            KeyRule(f"{mixer}_mixer.{old}", f"{ours}_mlp.{new}")
            for mixer, ours in (("patch", "token"), ("channel", "channel"))
            for old, new in (("0", "fc1"), ("3", "fc2"))
        ),
        KeyRule("un_group_layer", "ungroup"),
        KeyRule("ffn.layers.0.0", "mlp.fc1"),
        KeyRule("ffn.layers.1", "mlp.fc2"),
        KeyRule("dwconv.0", "dw.conv"),
        KeyRule("dwconv.1", "dw.norm"),
        KeyRule("^neck.attn.k_proj", "^neck.k_proj"),
        KeyRule("^head.fc", "^head"),
        KeyRule("^ln1", "^norm"),
        *(KeyRule(f"^norm{3 * i + 2}", f"^out_norms.{i}") for i in range(3)),
        *(KeyRule(f"^spm.stem.{3 * i}", f"^adapter.prior.stem.{i}.conv") for i in range(3)),
        *(KeyRule(f"^spm.stem.{3 * i + 1}", f"^adapter.prior.stem.{i}.norm") for i in range(3)),
        KeyRule("^spm.conv{i+2}.0", "^adapter.prior.convs.{i}.conv"),
        KeyRule("^spm.conv{i+2}.1", "^adapter.prior.convs.{i}.norm"),
        KeyRule("^spm.fc{i+1}", "^adapter.prior.fc.{i}", "conv"),
        KeyRule("^interactions.{i}.injector", "^adapter.interactions.{i}.injector"),
        KeyRule("^interactions.{i}.extra_extractors.{j}", "^adapter.interactions.{i}.extractors.{j+1}"),
        KeyRule("^interactions.{i}.extractor", "^adapter.interactions.{i}.extractors.0"),
        KeyRule("ffn.dwconv.dwconv", "ffn.dwconv"),
        KeyRule("^level_embed", "^adapter.level_embed"),
        KeyRule("^up", "^adapter.up"),
        KeyRule("^ad_norm{i+1}", "^adapter.norms.{i}"),
    )

    @classmethod
    def detector_args(cls, finest: int) -> dict[str, Any]:
        return {"adapter": True, "finest": finest}

    def __init__(
        self,
        embed_dim: Count = 216,
        depth: Depth = 12,
        num_heads: Count = 12,
        mlp_ratio: Factor = 4.0,
        group_tokens: Sequence[Count] = (64, 32, 32, 16),
        stem_convs: WholeNumber = 0,
        in_chans: Count = 3,
        num_classes: WholeNumber = 1000,
        global_pool: str = "group",
        img_size: SideOrPair = 224,
        drop_rate: Rate = 0.0,
        drop_path_rate: Rate = 0.0,
        dense: bool = False,
        adapter: bool = False,
        finest: Literal[4, 8] = 4,
    ) -> None:
        if len(group_tokens) != len(range(1, depth, 3)):
            raise UserError(
                f"group_tokens={tuple(group_tokens)} does not fit depth={depth}: give one number for each of the "
                f"{len(range(1, depth, 3))} layers 1, 4, 7, …"
            )
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        super().__init__(
            ConvStem(in_chans, embed_dim, stem_convs),
            [
                PropagationLayer(embed_dim, group_tokens[i // 3], mlp_ratio, rate)
                if i % 3 == 1
                else LocalLayer(embed_dim, num_heads, mlp_ratio, rate)
                for i, rate in enumerate(rates)
            ],
            img_size=img_size,
            patch_size=ConvStem.patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            prefix_tokens=(),
            drop_rate=drop_rate,
            dense=dense or adapter,
        )
        self.adapter: Adapter | None = None
        if adapter:
            self.adapter = Adapter(in_chans, embed_dim, drop_path_rate, len(self.dense_levels), finest)
            self.norm = nn.Identity()
            self.output_fmt = "NCHW"
            self.feature_info = [
                {"num_chs": embed_dim, "reduction": 4 * 2**i, "module": f"adapter.norms.{i}"}
                for i in range(finest // 8, 4)
            ]
        elif dense:
            self.out_norms = nn.ModuleList(nn.LayerNorm(embed_dim, eps=1e-6) for _ in self.dense_levels[:-1])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.global_pool != "group" or self.dense:
            self.neck: nn.Module = nn.Identity()
        elif not isinstance(getattr(self, "neck", None), Grouping):
            self.neck = Grouping(self.embed_dim, 1, pooling=True).to(next(self.parameters()).device)

    def pool(self, x_BNC: Tensor) -> Tensor:
        return self.neck(x_BNC)[:, 0] if isinstance(self.neck, Grouping) else super().pool(x_BNC)

    def no_weight_decay(self) -> set[str]:
        vectors = {name for name, _ in self.named_parameters() if name.endswith(("group_token", "level_embed"))}
        return super().no_weight_decay() | vectors

    @property
    def dense_info(self) -> list[dict[str, Any]]:
        return super().dense_info if self.adapter is None else self.feature_info

    # With the adapter -----------------------------------------------------------------------------------------------

    def adapt(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Image → tokens of the last layer and the adapter's four maps (B, h, w, C)."""
        assert self.adapter is not None
        self.check_size(x)
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, 32, axis=2)
        tokens, grid, _ = self.embed(x)

        def layers(first: int, end: int, tokens: Tensor) -> Tensor:
            for block in self.blocks[first:end]:
                tokens = self.run(block, tokens, grid)
            return tokens

        ends = [level + 1 for level in self.dense_levels]
        trunk = [partial(layers, first, end) for first, end in zip([0, *ends], ends, strict=False)]
        tokens, maps = self.adapter(to_map(x), tokens, grid, trunk)
        sizes = self.feature_sizes(height, width)
        return tokens, [map_[:, :h, :w] for map_, (h, w) in zip(maps, sizes, strict=True)]

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x) if self.adapter is None else self.adapt(x)[0]

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if self.adapter is None else self.forward_intermediates(x, intermediates_only=True)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return maps as in every plain model; with the adapter, the levels are its four maps."""
        if self.adapter is None:
            options = (return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only)
            return super().forward_intermediates(x, indices, *options)
        wanted, _ = take_indices(len(self.feature_info), indices, output_fmt)
        tokens, maps = self.adapt(x)
        chosen = [to_nchw(maps[i]) if output_fmt == "NCHW" else maps[i].flatten(1, 2) for i in wanted]
        return chosen if intermediates_only else (tokens, chosen)

    def feature_sizes(self, height: int, width: int) -> list[Grid]:
        return [patches_of(height, width, info["reduction"]) for info in self.feature_info]

    @classmethod
    def from_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().from_published({name.removeprefix("backbone."): tensor for name, tensor in state.items()})

    @classmethod
    def to_published(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move the pooling and the head out of the backbone, as in published files."""
        return {
            name if name.startswith(("neck.", "head.")) else f"backbone.{name}": tensor
            for name, tensor in super().to_published(state).items()
        }


VARIANTS = {
    f"gpvit_l{i + 1}": Variant(
        published=f"gpvit_l{i + 1}",
        args={"embed_dim": dim, "stem_convs": stem_convs, "global_pool": pool},
        drop_path=drop_path,
        top1={224: top1},
    )
    for i, (dim, stem_convs, pool, drop_path, top1) in enumerate(
        (
            (216, 0, "group", 0.2, 80.5),
            (348, 1, "group", 0.2, 83.4),
            (432, 1, "avg", 0.3, 84.1),
            (624, 2, "avg", 0.3, 84.3),
        )
    )
}

FAMILY = Family(
    model=GPViT,
    variants=VARIANTS,
    paper="GPViT: A High Resolution Non-Hierarchical Vision Transformer with Group Propagation, ICLR 2023, "
    "arXiv 2212.06795",
    repository="ChenhongyiYang/GPViT",
    licence="Apache-2.0",
    size_policy="Any size from one patch up: incomplete patches are padded after the stem's convolutions, and the "
    "position table is resized bicubically. The last stripe of an odd-sized grid is one line wide.",
    first_conv="patch_embed.stem.conv",
)
