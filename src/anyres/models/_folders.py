"""Models in folders of config.json and weights: ours, and those that timm or transformers wrote for such networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anyres.errors import UserError
from anyres.io import hub
from anyres.models._backbone import Backbone
from anyres.models._keys import best
from anyres.models._registry import ALWAYS_ON, PREFIX, classifiers, closest_model, entries, resolve_name


def model_of_folder(config: dict[str, Any], state: dict[str, Tensor], **overrides: Any) -> Backbone:
    """Build the registered model of a folder's `config.json` with its weights, in eval mode.

    A folder of timm or transformers becomes ours. Raises UserError if its network is none of ours, or if the weights do
    not match.
    """
    if "architecture" not in config:
        config = _from_transformers(config, state)
    name = resolve_name(str(config["architecture"]))
    if not str(config["architecture"]).startswith(PREFIX):
        config, state = _converted(name, config, state)
    return entries()[name].family.model.from_config(config, state, **overrides)


def _from_transformers(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the config that timm would write for a folder of transformers; the weights say which network it is."""
    name, shared = closest_model(state)
    if shared < 1:
        raise UserError(
            f"it is a {config['model_type']!r:.80} of transformers, and its weights are those of no registered model "
            f"(the closest, {name}, shares {shared:.0%} of its parameters)."
        )
    variant = entries()[name].variant
    size = variant.train_sizes[-1]
    stated = {"input_size": [3, size, size], "crop_pct": variant.crop_pct, "mean": variant.mean, "std": variant.std}
    return {**config, "architecture": name, "pretrained_cfg": {**stated, **config["pretrained_cfg"]}}


def _converted(name: str, config: dict[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert a config with the layout of timm, and weights under another library's names, of the model `name`."""
    family, variant = entries()[name]
    given = {key: value for key, value in config.get("model_args", {}).items() if key not in ALWAYS_ON}
    family.model.check_args(name, given)
    args = {**variant.args, "num_classes": config.get("num_classes", 1000), **given}
    own = hub.outline(lambda: family.model.from_args(name, args, given), len(state))
    layers = {"first_conv": family.first_conv, "classifier": classifiers(family)[0]}
    converted = {
        **config,
        "architecture": PREFIX + name,
        "model_args": args,
        "pretrained_cfg": {**config.get("pretrained_cfg", {}), **layers},
    }
    return converted, best(family.model.readings(state), own).state
