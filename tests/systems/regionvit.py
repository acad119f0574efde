from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from anyres.layers.maps import to_map, to_nchw
from tests.parity.reference import image

_TINY = {"embed_dims": (16, 32, 64, 128), "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}
SMALL = {"*_w14*": {**_TINY, "window": 6}, "*": _TINY}
FLOORS = True
UNREAD_MAPS = ["stages.3.norm"]  # the class is read from the regional map beside it


def options(about: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    return {"dense": True} if about["variant"].endswith("_dense") else {}


def regional(stage: int) -> Callable[[Any, Tensor], Tensor]:
    return lambda model, x: to_nchw([extra for _, extra in model.forward_stages(x)][stage])


_LOCAL = (24, 40), (33, 41), (26, 46), (27, 23)
_REGIONAL = {7: ((4, 6), (5, 5), (3, 7), (3, 3)), 14: ((2, 3), (3, 3), (1, 3), (1, 1))}


def probe(i: int, map_: int) -> Callable[[Any, Tensor], Tensor]:
    """A stage alone on fixed random maps; the first without its embedding."""

    def run(model: Any, x: Tensor) -> Tensor:
        stage = model.stages[i]
        width = model.feature_info[max(i - 1, 0)]["num_chs"]
        maps = [
            to_map(image([1, width, *size], seed + i))
            for size, seed in ((_LOCAL[i], 101), (_REGIONAL[stage.window][i], 201))
        ]
        if i:
            maps = [stage.downsample(one) for one in maps]
        return to_nchw(stage.mix(*maps, model.run)[map_])

    return run


OUTPUTS = {
    **{f"regional{i + 1}": regional(i) for i in range(4)},
    **{f"probe{i + 1}_{name}": probe(i, map_) for i in range(4) for map_, name in enumerate(("local", "regional"))},
}
