from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

_PLAIN = {"embed_dim": 48, "depth": 4, "num_heads": 3, "prune_before": (1, 2, 3)}
SMALL = {
    "dynamicvit_deit*": _PLAIN,
    "dynamicvit_lvvit*": _PLAIN,
}
FLOORS = True


def options(about: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    return {"img_size": about["config"]["img_size"]} if "lvvit" in about["variant"] else {}


def score(model: Any, x: Tensor, predictor: int) -> Tensor:
    """Log-probability of keeping (B, n) at a predictor."""
    predictors = model.predictors if hasattr(model, "predictors") else model.stages[2].predictors
    seen = []
    handle = predictors[predictor].register_forward_hook(lambda module, args, out: seen.append(out[..., 0]))
    model(x)
    handle.remove()
    return seen[0]


def kept(model: Any, x: Tensor, predictor: int) -> Tensor:
    """Positions kept after a predictor, ascending, of a single image: (1, n)."""
    return model.forward_train(x)["decisions"][:, predictor].nonzero()[None, :, 1]


OUTPUTS = {
    "cls": lambda model, x: model.forward_features(x)[:, 0],
    "tokens": lambda model, x: model.forward_features(x)[:, 1:],
    **{f"score{i + 1}": partial(score, predictor=i) for i in range(3)},
    **{f"keep{i + 1}": partial(kept, predictor=i) for i in range(3)},
}
