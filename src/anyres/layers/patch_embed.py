"""Patch embeddings: from images to tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from anyres.layers.maps import conv_grid, on_map, pad_to_multiple
from anyres.layers.resample import bilinear_matrix
from anyres.layers.sizes import round_up

Remainder = Literal["pad", "truncate"]


def patches_of(height: int, width: int, patch_size: int, remainder: Remainder = "pad") -> tuple[int, int]:
    """Return the number of rows and columns of patches in an image of this size."""
    extra = patch_size - 1 if remainder == "pad" else 0
    return (height + extra) // patch_size, (width + extra) // patch_size


class PatchEmbed(nn.Module):
    """Split an image into patches and project each: a convolution with kernel = stride = `patch_size` (ViT, equation
    1).

    `remainder` controls sides that are not a multiple of the patch size. "pad" adds zeros at the right and bottom, so
    no pixel is lost and every token contains at least one pixel. "truncate" drops the last rows and columns, as
    published ViT code does.

    `stored_size` is the side of the stored kernel. If patches have another size, the kernel is resized bilinearly
    without rescaling (UViT, section 4.1; from 16 to 8, every 2x2 block becomes its mean). The same product is computed
    the other way round: each patch is mapped to the kernel's size by the transpose of the resizing.
    """

    def __init__(
        self, patch_size: int, in_chans: int, dim: int, remainder: Remainder = "pad", stored_size: int | None = None
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.remainder = remainder
        self.stored_size = stored_size or patch_size
        self.proj = nn.Conv2d(in_chans, dim, self.stored_size, self.stored_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the number of rows and columns of tokens for an image of this size."""
        return patches_of(height, width, self.patch_size, self.remainder)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Embed an image: (B, in_chans, H, W) → (B, dim, h, w) with (h, w) = `grid(H, W)`."""
        if self.remainder == "pad":
            x_BCHW = pad_to_multiple(x_BCHW, self.patch_size, axis=2)
        if self.stored_size != self.patch_size:
            rows, columns = self.grid(*x_BCHW.shape[-2:])
            matrix = bilinear_matrix(self.patch_size, self.stored_size, x_BCHW.device).to(x_BCHW.dtype)
            x_BCHW = x_BCHW[..., : rows * self.patch_size, : columns * self.patch_size]
            x_BCHW = (x_BCHW.unflatten(-1, (columns, -1)) @ matrix).flatten(-2)
            x_BCHW = (x_BCHW.mT.unflatten(-1, (rows, -1)) @ matrix).flatten(-2).mT
        return self.proj(x_BCHW)


class ConvEmbed(nn.Module):
    """A strided convolution followed by a LayerNorm, the downsampling between stages: (B, H, W, C) → (B, h, w, C').

    Kernel = stride without padding is the embedding of PVT, Twins and Swin; kernel > stride is the overlapping
    embedding of PVT v2, P2T, CvT, CSWin and others. The output size is that of the convolution. `pad` first zero-pads
    at the right and bottom to a multiple of the stride. `eps` None omits the norm.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel: int,
        stride: int,
        padding: int = 0,
        eps: float | None = 1e-5,
        bias: bool = True,
        pad: bool = False,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, padding, bias=bias)
        self.norm: nn.Module = nn.Identity() if eps is None else nn.LayerNorm(dim, eps=eps)
        self.multiple = stride if pad else 1

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (h, w) for an input of this size."""
        return conv_grid(self.proj, round_up(height, self.multiple), round_up(width, self.multiple))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.norm(on_map(self.proj, pad_to_multiple(x_BHWC, self.multiple)))
