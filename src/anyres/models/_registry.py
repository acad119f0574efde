"""The model registry, which is timm's own; our names have the prefix `anyres_` there.

After `import anyres`, `timm.create_model("anyres_resformer_small", features_only=True)` works, and so does anything
else that uses timm's registry. `create_model` in this file does the same with shorter names and clearer errors.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureListNet
from timm.models._features_fx import FeatureGraphNet
from torch import Tensor, nn

from anyres import models
from anyres.errors import UserError
from anyres.models._backbone import Backbone, Family, Variant, pair
from anyres.models._checkpoints import choose_weights, fit_channels, load_checkpoint, read_state
from anyres.models._keys import best
from anyres.models._published import Published, fetch_weights, published
from anyres.options import check_kind

__all__ = ["create_model", "guess_model", "list_models", "model_info"]

PREFIX = "anyres_"
ALWAYS_ON = {"dynamic_img_size", "dynamic_img_pad", "strict_img_size"}
"""Options of fixed-size libraries that request what we always do; accepted and ignored."""


class Entry(NamedTuple):
    family: Family
    variant: Variant


@cache
def entries() -> dict[str, Entry]:
    """Return every registered model; each file in `anyres.models` defines one or more `Family` objects."""
    found = {}
    for module in pkgutil.iter_modules(models.__path__):
        if module.name.startswith("_"):  # shared code, not a paper
            continue
        content = vars(importlib.import_module(f"{models.__name__}.{module.name}"))
        for family in (value for value in content.values() if isinstance(value, Family)):
            for name, variant in family.variants.items():
                found[name] = Entry(family, variant)
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that match a shell pattern (`*`, `?`) such as `deit_*`.

    A word without wildcards matches anywhere in the name.
    """
    if not any(sign in pattern for sign in "*?["):
        pattern = f"*{pattern}*"
    return [name for name in entries() if fnmatch.fnmatchcase(name, pattern)]


def resolve_name(name: str) -> str:
    """Return the registered name of a registered, published or timm-prefixed name.

    Raises UserError with a suggestion if there is none.
    """
    plain = name.removeprefix(PREFIX)
    if plain in entries():
        return plain
    for registered, entry in entries().items():
        if plain == entry.variant.published:
            return registered
    for registered in entries():  # other spellings, such as HAT_Net_tiny
        if _letters(plain) == _letters(registered):
            return registered
    known = [*entries(), *(entry.variant.published for entry in entries().values())]
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "`anyres models` lists them all."
    raise UserError(f"There is no model {name!r}: {hint}")


def _letters(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    global_pool: str | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    checkpoint_path: str | Path | None = None,
    features_only: bool = False,
    out_indices: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model.

    Args:
        name: a name in `list_models()`, a published name (both may have a `.tag`, which chooses one of several
            published files), `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.
        pretrained: load the published weights, which are downloaded on first use and kept in the Hub's cache. With
            another `num_classes` the head is left out, and with other `in_chans` the first layer is adapted.
        num_classes: classes of the head; 0 for no head. Default: as published.
        in_chans: channels of the input. Default 3.
        img_size: native size, a side or (height, width), which sets the size of stored position tables. Inputs may have
            any size.
        checkpoint_path: a published or own weights file to load strictly.
        features_only: build a model that returns a list of feature maps (B, C, h, w), of the levels `out_indices`.
        kwargs: further arguments of the model's class, such as `patch_size`, `depth`, `position`; None means the
            default.

    Raises:
        UserError: unknown name or argument (the message suggests the nearest one that exists), or weights that cannot
            be downloaded (the message says where they are and how to load them).
    """
    chosen = {
        "num_classes": num_classes,
        "in_chans": in_chans,
        "img_size": img_size,
        "global_pool": global_pool,
        "drop_rate": drop_rate,
        "drop_path_rate": drop_path_rate,
        "out_indices": out_indices,
        **kwargs,
    }
    chosen = {key: value for key, value in chosen.items() if value is not None}
    if features_only:
        chosen["features_only"] = True
    if not name.startswith(("hf-hub:", "local-dir:")):
        stem, dot, tag = name.partition(".")
        stem = resolve_name(stem)
        tags = [file.tag for file in published()[stem]]
        if dot and tag not in tags:
            known = " or ".join(f"{stem}.{other}" for other in tags)
            raise UserError(f"{stem} has no weights {tag!r:.80}: choose {known}.")
        name = PREFIX + stem + dot + tag
    model: nn.Module = timm.create_model(name, pretrained=pretrained and checkpoint_path is None, **chosen)
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return model


def check_model_args(name: str, args: dict[str, Any]) -> None:
    """Raise UserError for arguments, given as text, that `create_model(name, **args)` does not accept.

    Accepted are a network's own arguments, `pretrained` and `checkpoint_path`.
    """
    rest = dict(args)
    for option, kind in (("pretrained", bool), ("checkpoint_path", str)):
        if option in rest:
            check_kind(option, rest.pop(option), kind)
    if not name.startswith(("hf-hub:", "local-dir:")):
        name = resolve_name(name.partition(".")[0])
        entries()[name].family.model.check_args(name, rest)


def guess_model(path: str | Path) -> str:
    """Return the registered model whose parameter names and shapes match a weights file exactly (with any head).

    Raises UserError if there is none; the message names the closest.
    """
    name, shared = closest_model(read_state(path))
    if shared < 1:
        raise UserError(
            f"{path} fits no registered model exactly (the closest, {name}, shares {shared:.0%} of its parameters): "
            "say which model it is for, as MODEL=FILE, or in Python build that with its options and load_checkpoint."
        )
    return name


def closest_model(content: Mapping[str, Any]) -> tuple[str, float]:
    """Return the registered model that shares most parameters with a checkpoint's content, and their part of all.

    Parameters are shared if they agree in name and shape; those of heads do not count.
    """
    known = cache(lambda kind: kind.readings(choose_weights(content, kind.averaged)[0]))
    closest: tuple[float, str] = (-1.0, "")
    for name, entry in entries().items():
        with torch.device("meta"):
            own = entry.family.model(**entry.variant.args).state_dict()
        heads = tuple(f"{head}." for head in classifiers(entry.family))
        wanted, state = (
            {key: tensor.shape for key, tensor in each.items() if not key.startswith(heads)}
            for each in (own, best(known(entry.family.model), own).state)
        )
        if wanted == state:
            return name, 1.0
        shared = sum(state.get(key) == shape for key, shape in wanted.items()) / max(len(wanted.keys() | state), 1)
        closest = max(closest, (min(shared, 0.99), name))
    return closest[1], closest[0]


def model_info(name: str) -> dict[str, Any]:
    """Return facts about a model without running it: names, results, licence, paper, size policy, parameters."""
    name = resolve_name(name)
    family, variant = entries()[name]
    with torch.device("meta"):
        model = family.model(**variant.args)
    return {
        "name": name,
        "published_name": variant.published,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "native_size": pair(published()[name][0].size),
        "train_sizes": list(variant.train_sizes),
        "minimum_size": model.minimum_size,
        "size_policy": family.size_policy,
        "top1": dict(variant.top1),
        "benchmark": variant.benchmark,
        "drop_path": variant.drop_path,
        "crop_pct": variant.crop_pct,
        "paper": family.paper,
        "repository": family.repository,
        "licence": family.licence,
        "weights": {file.tag: file.where for file in published()[name]},
        "notes": variant.notes,
    }


# timm's registry ----------------------------------------------------------------------------------------------------


def classifiers(family: Family) -> tuple[str, ...]:
    """Return the names of the heads of a family's models."""
    return (family.classifier,) if isinstance(family.classifier, str) else family.classifier


def _pretrained_cfg(entry: Entry, file: Published) -> dict[str, Any]:
    distilled = entry.variant.args.get("distilled", False)
    return {
        "url": file.download,
        "input_size": (3, file.size, file.size),
        "crop_pct": entry.variant.crop_pct if file.size in entry.variant.train_sizes else 1.0,
        "interpolation": "bicubic",
        "mean": entry.variant.mean,
        "std": entry.variant.std,
        "num_classes": file.classes,
        "first_conv": entry.family.first_conv,
        "classifier": entry.family.classifier if distilled else classifiers(entry.family)[0],
        "license": _HUB_LICENCES.get(entry.family.licence, entry.family.licence.lower()),
        "paper_name": entry.family.paper,
        "origin_url": f"https://github.com/{entry.family.repository}",
    }


_HUB_LICENCES = {"none stated": "unknown"}
"""The Hub's identifiers that are not the licence's own in lower case."""
_TIMM_OPTIONS = {
    "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_model_args", "cache_dir",
    "features_only", "out_indices", "feature_cls",
}  # fmt: skip


class _FeatureDict(FeatureGetterNet):
    """Feature maps by level number as a string, the type that timm's `feature_cls="dict"` should return."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = cast(Sequence[int], self.out_indices)
        return {str(level): map_ for level, map_ in zip(levels, super().forward(x), strict=True)}


_FEATURE_CLASSES: dict[Any, Any] = {
    "list": FeatureGetterNet,
    "dict": _FeatureDict,
    FeatureListNet: FeatureGetterNet,
    FeatureDictNet: _FeatureDict,
}
"""timm's own classes for lists and dictionaries run a model's children in sequence, which suits only plain chains."""


def _feature_class(wanted: Any) -> Any:
    if wanted in ("fx", FeatureGraphNet):
        raise UserError('feature_cls="fx" needs a traceable network: choose "getter", "list", "dict" or "hook".')
    return _FEATURE_CLASSES.get(wanted, wanted)


def _register(name: str, entry: Entry) -> None:
    family, variant = entry

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        timm_options = {key: kwargs.pop(key) for key in _TIMM_OPTIONS & kwargs.keys()}
        options = {key: value for key, value in kwargs.items() if key not in ALWAYS_ON}
        family.model.check_args(name, options)

        own = _own_weights(name, entry, timm_options) if pretrained else None

        def build(**args: Any) -> Backbone:
            model = family.model.from_args(name, args, options)
            model.architecture, model.model_args = PREFIX + name, args
            if own is not None:
                _start_from(model, *own, entry, timm_options.get("pretrained_strict", True))
            return model

        args = {**variant.args, **options}
        if "feature_cls" in timm_options:
            timm_options["feature_cls"] = _feature_class(timm_options["feature_cls"])
        features = {"feature_cls": "getter", "out_indices": family.model.default_out_indices(args)}
        model: nn.Module = build_model_with_cfg(
            build,
            PREFIX + name,
            pretrained and own is None,
            feature_cfg=features,
            pretrained_filter_fn=_filter_published,
            **timm_options,
            **args,
        )
        if isinstance(model, Backbone):  # what timm's configuration has no field for
            model.pretrained_cfg.setdefault("train_sizes", [list(pair(size)) for size in variant.train_sizes])
        return model

    entrypoint.__name__ = PREFIX + name
    entrypoint.__doc__ = f"{variant.published}: {family.paper}"
    register_model(entrypoint)


def _own_weights(name: str, entry: Entry, timm_options: dict[str, Any]) -> tuple[Path, int] | None:
    """Return (file, number of its classes) of weights in any layout, or None for those that timm itself loads.

    These are weights of a folder or from the Hub, a state dict, and other addresses than the published ones.
    """
    given = [timm_options.get(key) for key in ("pretrained_cfg", "pretrained_cfg_overlay")]
    config = resolve_pretrained_cfg(PREFIX + name, *given)
    if config.source in ("hf-hub", "local-dir") or config.state_dict or config.hf_hub_id:
        return None
    if config.file:
        return Path(config.file), config.num_classes
    file = next((file for file in published()[name] if file.tag == config.tag), published()[name][0])
    if config.url and config.url != file.download:
        return None
    with torch.device("meta"):
        network = entry.family.model(**{**entry.variant.args, "num_classes": file.classes})
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return fetch_weights(file, parameters, timm_options.get("cache_dir")), file.classes


def _start_from(model: Backbone, path: Path, classes: int, entry: Entry, strict: bool) -> None:
    """Load a classifier's file, without its head if the model is for another number of classes.

    The dense form keeps the initial values of what a classifier does not have.
    """
    skip = [f"{head}." for head in classifiers(entry.family)] if model.num_classes != classes else []
    if getattr(model, "dense", False):
        with torch.device("meta"):
            classifier = entry.family.model(**{**model.model_args, "dense": False})
        skip += model.state_dict().keys() - classifier.state_dict().keys()
    load_checkpoint(model, path, strict=strict, skip=skip)


def _filter_published(state: dict[str, Any], model: Backbone) -> dict[str, Tensor]:
    own = model.state_dict()
    state = best(model.readings(choose_weights(state, model.averaged)[0]), own).state
    return {**state, **model.fit_tables(state), **fit_channels(state, own, model.in_chans)}


default_cfgs = generate_default_cfgs(
    {
        f"{PREFIX}{name}.{file.tag}": _pretrained_cfg(entry, file)
        for name, entry in entries().items()
        for file in published()[name]
    }
)
for _name, _entry in entries().items():
    _register(_name, _entry)
