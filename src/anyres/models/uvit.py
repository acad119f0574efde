"""UViT: a plain transformer made for detection, with windows that are a fraction of the image.

One resolution and one width from the first block to the last, at stride 8 for dense tasks. Attention is global, or
confined to windows whose sides are those of the token grid divided by 2 (UViT) or, growing with depth, by 4, 2 and 1
(UViT+), so that they keep their share of the image at any size. Depth, width and input size follow a scaling rule.

Paper: "A Simple Single-Scale Vision Transformer for Object Detection and Instance Segmentation", Chen, Du, Yang,
Beyer, Zhai, Lin, Chen, Li, Song, Wang, Zhou, ECCV 2022, arXiv 2112.09747. There is neither a PyTorch implementation of
the authors nor a checkpoint, so what the paper leaves open is chosen here as DeiT has it: biases everywhere, norms with
eps 1e-6, exact GELU, the mean of the normed tokens for the classifier. There is no class token, which would have no
place in a window, and the classifier's attention is global, which is what the published costs agree with.

Any input size: the position table is resized bilinearly to the grid. Images are padded at the right and the bottom to
whole patches. Windows have ceil(side / n) tokens a side, counted from the top left; the last of a row or a column is
smaller where that does not divide the grid. The dense form cuts the image into patches of 8 with the stored 16x16
kernel resized (the mean of every 2x2 block), so that one set of weights serves both forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anyres.models._backbone import DetectorForm, Family, KeyRule, Variant
from anyres.models._plain import Plain
from anyres.options import Count, Depth


class UViT(Plain):
    """Plain transformer without class token (section 3). The dense form has stride 8 and constant windows, unless told
    otherwise, and returns one map."""

    detector = DetectorForm("standard", "last", "pyramid")
    pools = ("avg", "")
    fixed_options = ("prefix_tokens",)
    published_keys = (KeyRule("pos_embed", "position.table"),)

    def __init__(
        self,
        embed_dim: Count = 222,
        depth: Depth = 18,
        num_heads: Count = 6,
        position: str = "ape_bilinear",
        windows: str | Sequence[Count] | None = None,
        stride: Count | None = None,
        dense: bool = False,
        global_pool: str = "avg",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            position=position,
            windows=windows or ("constant" if dense else "global"),
            stride=stride or (8 if dense else None),
            prefix_tokens=(),
            dense=dense,
            global_pool=global_pool,
            **kwargs,
        )

    @classmethod
    def default_out_indices(cls, args: dict[str, Any]) -> tuple[int, ...]:
        """The last block: detectors get one map (section 3.1)."""
        return (args.get("depth", 18) - 1,)


VARIANTS = {
    f"uvit_{size}": Variant(
        published=f"uvit_{size}",
        args={"embed_dim": dim},
        drop_path=0.1,
        top1={224: top1},
        notes="No weights are published; UViT+ is windows='progressive'.",
    )
    for size, dim, top1 in (("tiny", 222, 76.0), ("small", 288, 78.9), ("base", 384, 81.3))
}

FAMILY = Family(
    model=UViT,
    variants=VARIANTS,
    paper="A Simple Single-Scale Vision Transformer for Object Detection and Instance Segmentation, ECCV 2022, "
    "arXiv 2112.09747",
    repository="tensorflow/models",
    licence="none stated",
    size_policy="Any size from one patch up: the position table is resized bilinearly, windows are a fixed fraction of "
    "the grid, and sides are padded to whole patches.",
)
