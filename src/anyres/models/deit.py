"""DeiT: the plain vision transformer trained on ImageNet-1k alone, and its distilled version.

The plain model is the ViT of "An image is worth 16x16 words" with a learned position table. The distilled model has a
second token, whose head learns the labels of a convolutional teacher; at test time the two heads' logits are averaged.

Paper: "Training data-efficient image transformers & distillation through attention", Touvron, Cord, Douze, Massa,
Sablayrolles, Jégou, ICML 2021, arXiv 2012.12877. Published code and weights: facebookresearch/deit (Apache-2.0).

Any input size: the position table is resized bicubically to the current grid (the authors' fine-tuning rule, with a
rectangular target for non-square inputs); the stored table never changes. Sides not divisible by the patch are padded.

Quirk that checkpoints depend on: the position table has a row for every prefix token, in token order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from anyres.models._backbone import Family, Variant
from anyres.models._keys import TRANSFORMERS_BLOCK, KeyRule, Layout
from anyres.models._plain import WINDOWED, Plain


class DeiT(Plain):
    """Plain transformer; `distilled` adds the distillation token and its head (section 4)."""

    published_keys = (KeyRule("pos_embed", "position.table"),)
    layouts = (
        Layout(
            "transformers",
            "embeddings.patch_embeddings",
            (
                KeyRule("^embeddings.cls_token", "^cls_token"),
                KeyRule("^embeddings.distillation_token", "^dist_token"),
                KeyRule("^embeddings.position_embeddings", "^pos_embed"),
                KeyRule("^embeddings.patch_embeddings.projection", "^patch_embed.proj"),
                KeyRule("^encoder.layer.{i}", "^blocks.{i}"),
                KeyRule("^layers.{i}", "^blocks.{i}"),
                KeyRule("^cls_classifier", "^head"),
                KeyRule("^distillation_classifier", "^head_dist"),
                *TRANSFORMERS_BLOCK,
            ),
            prefix=("deit.", "vit."),
        ),
    )

    @classmethod
    def detector_args(cls, finest: int) -> dict[str, Any]:
        return WINDOWED

    def __init__(
        self, distilled: bool = False, position: str = "ape", prefix_tokens: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if prefix_tokens is None:
            prefix_tokens = ("cls_token", "dist_token") if distilled else ("cls_token",)
        self.distilled = distilled and "dist_token" in prefix_tokens
        super().__init__(position=position, prefix_tokens=prefix_tokens, **kwargs)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.distilled:
            self.head_dist = self.new_head(self.num_classes)

    def get_classifier(self) -> nn.Module:
        return nn.ModuleList([self.head, self.head_dist]) if self.distilled else self.head

    def pool(self, x_BNC: Tensor) -> Tensor:
        """Return the mean of class and distillation token if there are both (as in timm), else pool by
        `global_pool`."""
        if self.distilled and self.global_pool == "token":
            return x_BNC[:, :2].mean(1)
        return super().pool(x_BNC)

    def forward_heads(self, x_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens after the final norm → (class logits, distillation logits)."""
        return self.head(self.head_drop(x_BNC[:, 0])), self.head_dist(self.head_drop(x_BNC[:, 1]))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or not (self.distilled and self.global_pool == "token"):
            return super().forward_head(x, pre_logits)
        logits, dist_logits = self.forward_heads(x)
        return (logits + dist_logits) / 2

    def forward_train(self, x: Tensor, targets: Sequence[str] = ("cls",)) -> dict[str, Tensor]:
        if not self.distilled:
            return super().forward_train(x, targets)
        tokens = self.encode(x, None if "gap" in targets else self.rows_read())
        logits, dist_logits = self.forward_heads(tokens)
        out = {"logits": logits, "dist_logits": dist_logits, "cls": tokens[:, 0]}
        if "gap" in targets:
            out["gap"] = tokens[:, 2:].mean(1)
        return out


def _variant(stem: str, dim: int, distilled: bool, size: int, top1: dict[int, float]) -> Variant:
    return Variant(
        published=stem,
        args={"embed_dim": dim, "num_heads": dim // 64, "distilled": distilled, "img_size": size},
        drop_path=0.1,
        top1=top1,
        train_sizes=(size,),
    )


VARIANTS = {
    "deit_tiny": _variant(
        "deit_tiny_patch16_224", 192, False, 224,
        {96: 8.06, 128: 52.16, 160: 65.68, 192: 70.18, 224: 72.20, 288: 73.10, 384: 71.29, 512: 66.07, 640: 59.31},
    ),
    "deit_small": _variant(
        "deit_small_patch16_224", 384, False, 224,
        {96: 17.55, 128: 67.02, 160: 75.62, 192: 78.60, 224: 79.85, 288: 80.02, 384: 78.10, 512: 72.63, 640: 63.86},
    ),
    "deit_base": _variant(
        "deit_base_patch16_224", 768, False, 224,
        {96: 27.86, 128: 73.18, 160: 79.05, 192: 81.06, 224: 81.85, 288: 82.19, 384: 81.11, 512: 78.23, 640: 74.23},
    ),
    "deit_tiny_distilled": _variant("deit_tiny_distilled_patch16_224", 192, True, 224, {224: 74.48}),
    "deit_small_distilled": _variant("deit_small_distilled_patch16_224", 384, True, 224, {224: 81.16}),
    "deit_base_distilled": _variant("deit_base_distilled_patch16_224", 768, True, 224, {224: 83.37}),
    "deit_base_384": _variant("deit_base_patch16_384", 768, False, 384, {384: 82.89}),
    "deit_base_distilled_384": _variant("deit_base_distilled_patch16_384", 768, True, 384, {384: 85.22}),
}  # fmt: skip

FAMILY = Family(
    model=DeiT,
    variants=VARIANTS,
    paper="Training data-efficient image transformers & distillation through attention, ICML 2021, arXiv 2012.12877",
    repository="facebookresearch/deit",
    licence="Apache-2.0",
    size_policy="Any size from one patch up: the position table is resized bicubically, and sides are padded to whole "
    "patches.",
    classifier=("head", "head_dist"),
)
