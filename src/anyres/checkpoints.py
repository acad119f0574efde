"""Weights files: read them safely, recognise published layouts, say what did not fit."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anyres.backbone import Backbone
from anyres.errors import UserError
from anyres.files import atomic_write

_NESTS = ("model", "state_dict", "model_state_dict", "model_state", "module", "net")
_EMA_NESTS = ("model_ema", "state_dict_ema", "ema")
_CLASSIFIER = ("head.", "head_dist.", "aux_head.", "hidden.", "norm.", "cls_token", "dist_token")
"""Where our models keep what the dense form has not."""
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "bottom_up.", "model.", "encoder.")


@dataclass
class LoadReport:
    """What a checkpoint brought and what it did not."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Every parameter of the model came from the file, and nothing in the file was left over."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what in ("resized", "missing", "unexpected", "mismatched"):
            names = getattr(self, what)
            if names:
                shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
                parts.append(f"{len(names)} {what} ({shown})")
        return "; ".join(parts)


class _Arrays(pickle.Unpickler):
    """Reads dictionaries of NumPy arrays, as detectron2's `.pkl` files are, and refuses everything that runs code."""

    harmless = frozenset(
        {
            ("collections", "OrderedDict"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            *(
                (f"numpy.{core}.{module}", name)
                for core in ("core", "_core")
                for module, name in (
                    ("multiarray", "_reconstruct"),
                    ("multiarray", "scalar"),
                    ("numeric", "_frombuffer"),
                )
            ),
            ("_codecs", "encode"),  # bytes, in old protocols
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.harmless:
            raise _Foreign(f"{module}.{name}")
        return super().find_class(module, name)


class _Foreign(pickle.UnpicklingError):
    """The name of something that a file wants to call."""


def _read_arrays(path: Path) -> Any:
    """The content of a pickle file of arrays, the arrays as tensors."""

    def tensors(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: tensors(inner) for key, inner in value.items()}
        numeric = isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
        return torch.from_numpy(value.copy()) if numeric else value

    with path.open("rb") as file:
        return tensors(_Arrays(file, encoding="latin1").load())


def read_state(path: str | Path) -> dict[str, Any]:
    """The content of a `.safetensors`, a torch file or a `.pkl` of NumPy arrays, without running code from it.

    Errors: FileNotFoundError; UserError for a damaged file or one that would need to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weights file {path}: check the path.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        arrays = path.suffix == ".pkl" and not zipfile.is_zipfile(path)
        content = _read_arrays(path) if arrays else _read_torch(path)
    except pickle.UnpicklingError as error:
        names = [str(error)] if isinstance(error, _Foreign) else _foreign_classes(path)
        detail = f"it refers to {', '.join(names)}" if names else "it is damaged, no torch file, or an old one"
        raise UserError(
            f"{path} cannot be read safely ({detail}): convert it to safetensors where you trust it."
        ) from error
    except Exception as error:  # torch meets a damaged file with whatever its parser stumbles over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or no weights file ({reason}): download or copy it again.") from error
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds a {type(content).__name__}, not a dictionary of weights: give a checkpoint file."
        )
    return dict(content)


def _read_torch(path: Path) -> Any:
    # The argument namespace is the one foreign class that published training scripts store beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _foreign_classes(path: Path) -> list[str]:
    """Names of the classes and functions that a torch file wants to call, as far as they can be told."""
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the file is damaged besides
        return []


def pick_state(
    content: Mapping[str, Any], model: type[Backbone], names: set[str], ema: bool = False, part: bool = False
) -> dict[str, Tensor]:
    """Find the weights in a checkpoint's content and rename them to ours.

    Looks under "model", "state_dict", … (with `ema`, under "model_ema", …), takes off prefixes such as "module." or
    "backbone.", and applies the model's key map. `names`: our parameter names, which decide which prefix is right.
    `part`: the file may be that of a larger network, whose other parts have not the prefix: they are left out.
    """
    for nest in (*(_EMA_NESTS if ema else ()), *_NESTS):
        inner = content.get(nest)
        if isinstance(inner, Mapping) and any(torch.is_tensor(value) for value in inner.values()):
            return pick_state(inner, model, names, part=part)
    state = {name: value for name, value in content.items() if torch.is_tensor(value)}
    return max(
        (model.from_published(stripped) for stripped in _without_prefixes(state, part)),
        key=lambda candidate: (len(names & candidate.keys()), -len(candidate) if part else 0),
    )


def _without_prefixes(state: dict[str, Tensor], part: bool) -> list[dict[str, Tensor]]:
    """The state itself, then with each known prefix taken off, and off that again (at most three deep); of a `part`
    only what has the prefix."""
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


def load_checkpoint(model: nn.Module, path: str | Path, strict: bool = True, ema: bool = False) -> LoadReport:
    """Load a published or own weights file into a model.

    Position tables of another native size are resized (and reported). With `strict` everything must fit; without, what
    fits is loaded and the rest reported. `ema` prefers the averaged weights where a file has both.

    Errors: FileNotFoundError; UserError for a damaged file or weights that belong to another model; the model is then
        unchanged.
    """
    if not isinstance(model, Backbone):
        raise UserError(
            f"load_checkpoint fills models of anyres, not a {type(model).__name__}: build it with create_model."
        )
    own = model.state_dict()
    dense = getattr(model, "dense", False)
    state = pick_state(read_state(path), type(model), set(own), ema, part=dense)
    resized = model.fit_tables(state)
    state |= resized
    report = LoadReport(resized=list(resized))
    if dense:  # a file of the whole network serves as well; its classifier is not wanted
        state = {name: tensor for name, tensor in state.items() if name in own or not name.startswith(_CLASSIFIER)}
    for name, tensor in state.items():
        if name not in own:
            report.unexpected.append(name)
        elif tensor.shape != own[name].shape:
            report.mismatched.append(f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}")
        else:
            report.loaded.append(name)
    report.missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    if not report.loaded or (strict and not report.complete):
        name = (model.architecture or type(model).__name__).removeprefix("anyres_")
        only_head = report.loaded and all(
            item.split(".")[0].startswith("head") for item in report.mismatched + report.missing + report.unexpected
        )
        # Said on the command line, too, which has no `strict`.
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
    """Write a flat state dict: `.safetensors`, or a torch file under the key "model" as published ones are. Atomic."""
    path = Path(path)
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    with atomic_write(path, "weights") as temporary:
        if path.suffix == ".safetensors":
            save_file(state, temporary, metadata={"format": "pt"})
        else:
            torch.save({"model": state}, temporary)
