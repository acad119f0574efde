from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from anyres.layers.maps import to_map, to_nchw
from tests.parity.reference import image

SMALL = {
    "dat_p*": {
        "embed_dims": (16, 24, 32, 48),
        "blocks": ("ND", "N", "ND", "DD"),
        "num_heads": (1, 2, 2, 3),
        "groups": (1, 2, 2, 3),
    },
    "dat_*": {
        "embed_dims": (16, 24, 32, 48),
        "blocks": ("LS", "S", "LD", "D"),
        "num_heads": (1, 2, 2, 3),
        "groups": (1, 1, 2, 3),
    },
}


def options(about: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    config = about["config"]
    size = config["img_size"]
    return {
        "img_size": size if isinstance(size, int) else tuple(size),
        "window_size": config["window_sizes"][0],
        "dense": about["variant"].endswith("_dense"),
    }


def probe(stage: int, block: int, part: str, shape: list[int], seed: int) -> Callable[[Any, Tensor], Tensor]:
    """The output of one submodule alone on an image of its own."""
    return lambda model, x: to_nchw(getattr(model.stages[stage].blocks[block], part)(to_map(image(shape, seed))))


def deform3(model: Any, x: Tensor) -> Tensor:
    """Both generations' first recorded case has a probe of this name, on another map."""
    shape, seed = ([1, 384, 14, 14], 103) if model.embed_dim == 96 else ([1, 256, 14, 21], 105)
    return probe(2, 1, "attn", shape, seed)(model, x)


def deform4(model: Any, x: Tensor) -> Tensor:
    if model.embed_dim == 96:
        return probe(3, 1, "attn", [1, 768, 7, 7], 104)(model, x)
    return probe(3, 0, "attn", [1, 512, 5, 8], 106)(model, x)


OUTPUTS = {
    "probe_local": probe(0, 0, "attn", [1, 96, 56, 56], 101),
    "probe_shift": probe(0, 1, "attn", [1, 96, 56, 56], 102),
    "probe_nat1": probe(0, 0, "attn", [1, 64, 20, 33], 101),
    "probe_deform1": probe(0, 1, "attn", [1, 64, 40, 57], 102),
    "probe_deform2": probe(1, 1, "attn", [1, 128, 28, 19], 103),
    "probe_nat3_small": probe(2, 0, "attn", [1, 256, 5, 9], 104),
    "probe_deform3": deform3,
    "probe_deform4": deform4,
    "probe_mlp1": probe(0, 0, "mlp", [1, 64, 13, 9], 107),
}
