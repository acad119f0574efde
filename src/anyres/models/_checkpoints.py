"""Weights files: safe reading, recognising published layouts, and reporting what did not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from anyres.errors import UserError, first_line
from anyres.io import hub
from anyres.io.files import atomic_write
from anyres.io.pickles import read_pickle
from anyres.models._backbone import Backbone

_NESTS = ("model", "state_dict", "model_state_dict", "model_state", "module", "net")
_EMA_NESTS = ("model_ema", "state_dict_ema", "ema")
_CLASSIFIER = ("head.", "head_dist.", "aux_head.", "hidden.", "norm.", "cls_token", "dist_token")
"""Names of the parts of our models that the dense form does not have."""
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "bottom_up.", "model.", "encoder.")


@dataclass
class LoadReport:
    """The result of loading a checkpoint: what was loaded and what was not."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    """Tables of another native size."""
    adapted: list[str] = field(default_factory=list)
    """Layers that read images of another number of channels."""
    foreign: list[str] = field(default_factory=list)
    """Non-tensor classes and functions that the file refers to; their objects were left out."""

    @property
    def complete(self) -> bool:
        """True if every parameter of the model came from the file and nothing in the file was left over."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what in ("resized", "adapted", "missing", "unexpected", "mismatched", "foreign"):
            names = getattr(self, what)
            if names:
                parts.append(f"{len(names)} {what} ({_some(names)})")
        return "; ".join(parts)


def _some(names: Sequence[str]) -> str:
    return ", ".join(name[:80] for name in names[:3]) + (", …" if len(names) > 3 else "")


class Weights(dict[str, Any]):
    """The content of a weights file; `foreign` has the names of classes whose objects were left out."""

    foreign: Sequence[str] = ()


def read_state(path: str | Path) -> Weights:
    """Read a `.safetensors` file, a torch file or a `.pkl` file of NumPy arrays, without running any code in it.

    Objects other than tensors, arrays and plain values are left out. Raises FileNotFoundError, and UserError for a
    damaged file or one without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weights file {path}: check the path.")
    if path.suffix == ".safetensors":
        return Weights(hub.read_weights(path))
    try:
        content, foreign = read_pickle(path)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle is a program with arbitrary mistakes
        raise UserError(
            f"{path} is damaged or no weights file ({first_line(error)}): download or copy it again."
        ) from error
    others = f", but objects of {_some(foreign)}" if foreign else ""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no dictionary of weights{others}: give a checkpoint file.")
    state = Weights((name, value) for name, value in content.items() if isinstance(name, str))
    state.foreign = foreign
    if not any(_tensors(_nested(state, (*_EMA_NESTS, *_NESTS)))):
        raise UserError(f"{path} holds no weights{others}: give a file of tensors, as of model.state_dict().")
    return state


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in content.items() if torch.is_tensor(value) and isinstance(name, str)}


def _nested(content: Mapping[str, Any], nests: Sequence[str]) -> Mapping[str, Any]:
    """Return the content under the first of the names `nests` that contains tensors.

    `_NESTS` are then looked for in it again, up to three times.
    """
    for _ in range(3):
        found = (content.get(nest) for nest in nests)
        inner = next((each for each in found if isinstance(each, Mapping) and _tensors(each)), None)
        if inner is None:
            break
        content, nests = inner, _NESTS
    return content


def pick_state(
    content: Mapping[str, Any], model: type[Backbone], names: set[str], ema: bool = False, part: bool = False
) -> dict[str, Tensor]:
    """Find the weights in a checkpoint's content and convert their names to ours.

    Looks under "model", "state_dict", … (with `ema`, under "model_ema", …), removes prefixes such as "module." or
    "backbone.", and applies the model's key map. `names` are our parameter names, which decide which prefix is right.
    With `part`, the file may be of a larger network, whose other parts lack the prefix and are left out.
    """
    state = _tensors(_nested(content, (*(_EMA_NESTS if ema else ()), *_NESTS)))
    return max(
        (model.from_published(stripped) for stripped in _without_prefixes(state, part)),
        key=lambda candidate: (len(names & candidate.keys()), -len(candidate) if part else 0),
    )


def _without_prefixes(state: dict[str, Tensor], part: bool) -> list[dict[str, Tensor]]:
    """Return the state itself, then versions with known prefixes removed, up to three levels deep.

    With `part`, only the entries that have the prefix are kept.
    """
    found = [state]
    frontier = [state]
    for _ in range(3):
        frontier = [
            {
                name.removeprefix(prefix): tensor
                for name, tensor in candidate.items()
                if not part or name.startswith(prefix)
            }
            for candidate in frontier
            for prefix in _PREFIXES
            if any(name.startswith(prefix) for name in candidate)
        ]
        found += frontier
    return found


def fit_channels(state: Mapping[str, Tensor], own: Mapping[str, Tensor], in_chans: int) -> dict[str, Tensor]:
    """Return the layers of `state` that read RGB images, adapted to a model with `in_chans` channels by timm's rule.

    One channel gets the sum of the three; more get copies of them in turn, scaled so that their sum stays the same.
    """
    adapted = {}
    for name, tensor in state.items():
        place = own.get(name)
        if place is None or not place.ndim == tensor.ndim > 3 or tensor.shape[1] != 3 or in_chans == 3:
            continue
        if place.shape == (len(tensor), in_chans, *tensor.shape[2:]):
            adapted[name] = adapt_input_conv(in_chans, tensor.flatten(3)).view(place.shape)
    return adapted


def load_checkpoint(
    model: nn.Module, path: str | Path, strict: bool = True, ema: bool = False, skip: Collection[str] = ()
) -> LoadReport:
    """Load a published or own weights file into a model.

    Position tables with another native size are resized (and reported). With `strict` everything must match; otherwise
    whatever matches is loaded and the rest is reported. `ema` prefers the averaged weights if a file has both.
    Parameters whose names start with one in `skip` keep their values.

    Raises FileNotFoundError, and UserError for a damaged file or weights of a different model. The model is then
    unchanged.
    """
    if not isinstance(model, Backbone):
        raise UserError(
            f"load_checkpoint fills models of anyres, not a {type(model).__name__}: build it with create_model."
        )
    own = model.state_dict()
    dense = getattr(model, "dense", False)
    file = read_state(path)
    state = pick_state(file, type(model), set(own), ema, part=dense)
    tables = {
        name: tensor
        for name, tensor in state.items()
        if name in own and tensor.numel() and tensor.is_floating_point() and tensor.ndim == own[name].ndim
    }
    resized = model.fit_tables(tables)
    adapted = fit_channels(state, own, model.in_chans)
    state |= resized | adapted
    report = LoadReport(resized=list(resized), adapted=list(adapted), foreign=list(file.foreign))
    if dense:  # a file of the whole network is fine too; its classifier is not needed
        state = {name: tensor for name, tensor in state.items() if name in own or not name.startswith(_CLASSIFIER)}
    passed = tuple(skip)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(passed)}
    for name, tensor in state.items():
        if name not in own:
            report.unexpected.append(name)
        elif tensor.shape != own[name].shape:
            report.mismatched.append(f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}")
        elif not hub.fits(tensor, own[name]):
            report.mismatched.append(f"{name} {hub.describe(tensor)} for {hub.describe(own[name])}")
        else:
            report.loaded.append(name)
    wanted = [name for name in own if not name.startswith(passed) and not name.endswith("num_batches_tracked")]
    report.missing = [name for name in wanted if name not in state]
    if not report.loaded or (strict and not report.complete):
        name = (model.architecture or type(model).__name__).removeprefix("anyres_")
        only_head = report.loaded and all(
            item.split(".")[0].startswith("head") for item in report.mismatched + report.missing + report.unexpected
        )
        # Also shown on the command line, which has no `strict`.
        fix = (
            "build the model with the file's number of classes (num_classes), or start a training from it with "
            "init_from, which leaves out the head"
            if only_head
            else "choose the model and options that the file was made with"
        )
        raise UserError(f"{path} does not fit {name} ({report}): {fix}.")
    model.load_state_dict({name: state[name] for name in report.loaded}, strict=False)
    return report


def save_weights(state: dict[str, Tensor], path: str | Path) -> None:
    """Write a flat state dict atomically: `.safetensors`, or a torch file under the key "model", as published files
    are."""
    path = Path(path)
    # Published names may share a tensor, and safetensors does not write shared memory.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with atomic_write(path, "weights") as temporary:
        if path.suffix == ".safetensors":
            save_file(state, temporary, metadata={"format": "pt"})
        else:
            torch.save({"model": state}, temporary)
