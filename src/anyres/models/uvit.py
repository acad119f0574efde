"""UViT: a plain transformer designed for detection, with windows that are a fraction of the image.

All blocks have the same resolution and width, at stride 8 for dense tasks. Attention is global, or limited to windows
whose sides are those of the token grid divided by 2 (UViT), or by 4, 2 and 1 with increasing depth (UViT+), so that a
window covers the same share of the image at any size. Depth, width and input size follow a scaling rule.

Paper: "A Simple Single-Scale Vision Transformer for Object Detection and Instance Segmentation", Chen, Du, Yang, Beyer,
Zhai, Lin, Chen, Li, Song, Wang, Zhou, ECCV 2022, arXiv 2112.09747. The authors published no PyTorch implementation and
no checkpoint, so details that the paper leaves open are chosen as in DeiT: biases everywhere, norms with eps 1e-6,
exact GELU, and for the classifier the mean of the normed tokens. There is no class token, because it would belong to no
window, and the classifier's attention is global, in agreement with the published costs.

Any input size: the position table is resized bilinearly to the grid. Images are padded at the right and the bottom to
whole patches. Windows have ceil(side / n) tokens per side, counted from the top left; the last one in a row or column
is smaller if that does not divide the grid. The dense form uses patches of 8 and resizes the stored 16x16 kernel (the
mean of every 2x2 block), so that both forms share one set of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anyres.models._backbone import DetectorForm, Family, Variant
from anyres.models._keys import KeyRule
from anyres.models._plain import Plain
from anyres.options import Count, Depth


class UViT(Plain):
    """Plain transformer without class token (section 3).

    By default, the dense form has stride 8 and "constant" windows; it returns one map.
    """

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
        """Return the last block's index, because detectors use one map (section 3.1)."""
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
