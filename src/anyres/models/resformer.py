"""ResFormer: a plain transformer that keeps its accuracy at sizes it was not trained at.

Three things make it robust to the input size. Every training image is used at several resolutions in one step, and the
class token of a smaller copy is pulled towards that of the next larger one (both are in `anyres.training`). Position
encodings change smoothly with the input: a global term, the sine map after a depthwise convolution, is added once
(GPE), and a local term, a depthwise convolution of the values, is added inside each attention (LPE).

Paper: "ResFormer: Scaling ViTs with Multi-Resolution Training", Tian, Wu, Dai, Hu, Qiao, Jiang, CVPR 2023,
arXiv 2212.00776. Published code and weights: ruitian12/resformer (MIT).

Any input size: no weight depends on the size, so one state dict works for all. The published code accepts square inputs
and drops the rows and columns that do not fill a patch. Here the sine map normalises rows by the height and columns by
the width (the same numbers for squares), and by default the image is padded at the right and the bottom
(`remainder="truncate"` gives the published numbers).

Quirks that checkpoints depend on: the sine map counts from 1; all heads share one set of LPE filters; the class token
gets neither of the two terms, not even the biases of their convolutions.
"""

from __future__ import annotations

from typing import Any

from anyres.models._backbone import Family, Variant
from anyres.models._keys import KeyRule
from anyres.models._plain import WINDOWED, Plain


class ResFormer(Plain):
    """Plain transformer with global-local position embedding (section 3.3).

    `position` selects another encoding, as in the ablations of Table 5.
    """

    published_keys = (
        KeyRule("pos_embed.embed_layer", "position.conv"),
        KeyRule("attn.get_v", "attn.local.conv"),
    )

    @classmethod
    def detector_args(cls, finest: int) -> dict[str, Any]:
        return WINDOWED

    def __init__(self, position: str = "glpe", **kwargs: Any) -> None:
        super().__init__(position=position, **kwargs)


_MULTI = (128, 160, 224)


def _at(*top1: float) -> dict[int, float]:
    """Map the test sizes of Table 1 to top-1 accuracies."""
    return dict(zip((96, 112, 128, 160, 192, 224, 288, 384, 448, 512, 640), top1, strict=True))


VARIANTS = {
    "resformer_tiny": Variant(
        published="resformer_tiny_patch16",
        args={"embed_dim": 192, "num_heads": 3},
        drop_path=0.1,
        train_sizes=_MULTI,
        top1=_at(61.40, 64.93, 67.78, 71.09, 72.97, 73.85, 74.85, 75.04, 74.39, 73.77, 71.65),
    ),
    "resformer_small": Variant(
        published="resformer_small_patch16",
        args={"embed_dim": 384, "num_heads": 6},
        drop_path=0.1,
        train_sizes=_MULTI,
        top1=_at(73.59, 76.64, 78.24, 80.39, 81.42, 82.16, 82.70, 82.72, 82.52, 82.00, 80.72),
        notes="A second file, trained at (128, 224, 384): "
        "72.92 @96, 77.84 @128, 80.09 @160, 82.28 @224, 83.70 @384, 83.86 @512.",
    ),
    "resformer_base": Variant(
        published="resformer_base_patch16",
        args={"embed_dim": 768, "num_heads": 12},
        drop_path=0.2,
        train_sizes=_MULTI,
        top1=_at(75.86, 78.42, 79.74, 81.52, 82.28, 82.72, 83.02, 83.29, 82.90, 82.63, 81.72),
    ),
}  # fmt: skip

FAMILY = Family(
    model=ResFormer,
    variants=VARIANTS,
    paper="ResFormer: Scaling ViTs with Multi-Resolution Training, CVPR 2023, arXiv 2212.00776",
    repository="ruitian12/resformer",
    licence="MIT",
    size_policy="Any size from one patch up: positions are computed from the grid, and sides are padded to whole "
    "patches.",
)
