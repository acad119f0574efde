"""Open a model from a text, such as a path or a name on the command line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from anyres.data.classes import read_names
from anyres.errors import UserError
from anyres.io import hub
from anyres.io.files import existing
from anyres.models._backbone import Backbone
from anyres.models._checkpoints import check_joined, load_checkpoint
from anyres.models._published import published
from anyres.models._registry import PREFIX, create_model, entries, guess_model, resolve_name
from anyres.tasks import load_pretrained
from anyres.tasks.finite import check_weights

logger = logging.getLogger(__name__)

FORMS = (
    "a run folder, the folder of a saved model, hf-hub:OWNER/NAME, a published weights file (FILE or MODEL=FILE), "
    "a name from `anyres models`, or timm:NAME"
)

Weights = Literal["best", "last", "best_ema", "last_ema"]
"""Folders of a run: the weights of its best validation and its last ones, and their moving averages."""


def open_model(spec: str, names: str | None = None, weights: Weights = "best") -> tuple[str, nn.Module]:
    """Return (short name, model in eval mode).

    Args:
        spec: one of `FORMS`, or LABEL:=SPEC to set the short name.
        names: a file of class names in the order of the outputs, which replace the model's own.
        weights: those to take of a run folder; the name of a run's model says which they are, as in "RUN (best)". Of
            a weights file that has both, "best_ema" and "last_ema" take the averaged ones.

    Raises:
        FileNotFoundError: if a file or folder does not exist.
        UserError: if the model cannot be loaded, its weights are not finite, or `names` does not fit its outputs.
    """
    model: Any
    name, model = _open(spec, weights)
    check_weights(model, spec)
    if names is not None:
        given, count = read_names(names), getattr(model, "num_classes", None)
        if len(given) != count:
            raise UserError(f"{names} names {len(given)} classes, and {spec} has {count} outputs: give one for each")
        model.pretrained_cfg = {**(getattr(model, "pretrained_cfg", None) or {}), "label_names": given}
    return name, model


def _open(spec: str, weights: Weights) -> tuple[str, nn.Module]:
    label, sign, rest = spec.partition(":=")
    if sign:
        return label, _open(rest, weights)[1]
    if spec.startswith("timm:"):
        name = spec.removeprefix("timm:")
        return name, timm_model(name)
    if spec.startswith(("hf-hub:", "local-dir:")):
        return Path(spec.partition(":")[2]).name, load_pretrained(spec)
    path = Path(spec)
    if path.is_dir():
        return _from_folder(path, weights)
    ema = True if weights.endswith("_ema") else None
    if path.is_file():
        return path.stem, from_file(path, ema=ema)
    architecture, sign, file = spec.partition("=")
    if sign:
        if not Path(file).is_file():
            raise FileNotFoundError(f"There is no weights file {file}: check the path.")
        return Path(file).stem, from_file(Path(file), architecture, ema)
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"There is no model {spec}: give {FORMS}.")
    name = resolve_name(spec.partition(".")[0])
    return name, create_model(spec, pretrained=True).eval()


def _from_folder(path: Path, weights: Weights) -> tuple[str, nn.Module]:
    check_joined(path)
    if (path / hub.CONFIG).is_file():
        name = f"{path.absolute().parent.name} ({path.name})" if path.name in get_args(Weights) else path.name
        return name, load_pretrained(path)
    chosen = existing(path / weights)
    if chosen.is_dir():
        return f"{path.absolute().name} ({weights})", load_pretrained(chosen)
    there = [name for name in get_args(Weights) if existing(path / name).is_dir()]
    if there:
        raise FileNotFoundError(f"{path} holds no {weights} weights: give weights={' or weights='.join(there)}.")
    raise FileNotFoundError(
        f"{path} contains neither a finished run (RUN/best) nor a saved model (config.json): give {FORMS}."
    )


def weights_folder(spec: str, weights: Weights) -> tuple[Path, Path] | None:
    """(run folder, folder of its weights) of what is given for a model, or None if it is none of a run."""
    path = Path(spec)
    if (path / hub.CONFIG).is_file():
        return (path.absolute().parent, path) if path.name in get_args(Weights) else None
    return (path.absolute(), path / weights) if (path / weights / hub.CONFIG).is_file() else None


def published_top1(spec: str, model: nn.Module, classes: int) -> dict[int, float]:
    """Top-1 on ImageNet-1k by side that its authors report for a model with their weights: given by its name or as
    their weights file, and judged on so many classes. Empty for every other one."""
    own = Path(spec.split(":=", 1)[-1]).is_dir() or ":" in spec.split(":=", 1)[-1]
    name = str(getattr(model, "architecture", "")).removeprefix(PREFIX)
    if own or classes != 1000 or name not in entries():
        return {}
    variant = entries()[name].variant
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    first = config.get("tag") in (None, published()[name][0].tag)
    return dict(variant.top1) if first and variant.benchmark == "ImageNet-1k" else {}


def from_file(path: Path, architecture: str | None = None, ema: bool | None = None) -> Backbone:
    """Load a published weights file into `architecture`, or into the only registered model that the file fits.

    `ema` chooses between averaged and raw weights, as in `load_checkpoint`. What is notable about loading is logged.
    """
    name = resolve_name(architecture) if architecture else guess_model(path)
    family = entries()[name].family
    model = create_model(name)
    assert isinstance(model, family.model)
    report = load_checkpoint(model, path, ema=ema)
    if report.notable:
        logger.warning("%s: %s", path, report)
    return model.eval()


def timm_model(name: str, pretrained: bool = True) -> nn.Module:
    """Build a timm model for comparison, with a flexible input size if timm supports it (`dynamic_img_size`).

    Models that timm builds for a single size do not run at other sizes. Raises UserError for a name that timm does not
    have.
    """
    import difflib

    import timm

    if not timm.is_model(name):
        known = timm.list_models(pretrained=pretrained)
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else "in Python, timm.list_models() lists them"
        raise UserError(f"timm has no model '{name}'; {hint}")
    try:
        return timm.create_model(name, pretrained=pretrained, dynamic_img_size=True).eval()
    except TypeError:  # the model does not have this option
        return timm.create_model(name, pretrained=pretrained).eval()
