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
from anyres.models._keys import best

_NESTS = ("model", "state_dict", "model_state_dict", "model_state", "module", "net", "student")
_AVERAGED_NESTS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "teacher")
KINDS = {"auto": None, "raw": False, "averaged": True}
"""Values of the option that chooses between raw and averaged weights, as `ema` of `load_checkpoint`."""
_JOINERS = {
    "*.distcp": "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {0} FILE.pth",
    "zero_to_fp32.py": "python {0}/zero_to_fp32.py {0} FOLDER",
}
"""Commands that join checkpoints of FSDP and DeepSpeed, by what their folders contain."""
_DEPTH = 3
"""Nests within nests that are looked into."""
_CLASSIFIER = ("head.", "head_dist.", "aux_head.", "hidden.", "norm.", "cls_token", "dist_token")
"""Names of the parts of our models that the dense form does not have."""
_COUNTERS = ("num_batches_tracked", "n_averaged")
"""Ends of names of buffers that no output depends on."""


@dataclass
class LoadReport:
    """The result of loading a checkpoint: what was loaded and what was not. As text, it is a sentence for a person."""

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
    library: str = ""
    """The library whose names the file has, if not the published ones or ours."""
    averaged: bool = False
    """Whether the weights are moving averages."""
    has_both: bool = False
    """Whether the file has both the averages and the weights themselves."""

    @property
    def complete(self) -> bool:
        """True if every parameter of the model came from the file and nothing in the file was left over."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def notable(self) -> bool:
        """Whether there is more to tell than that everything was loaded."""
        changed = self.resized or self.adapted or self.library
        return not self.complete or self.has_both or bool(changed)

    def __str__(self) -> str:
        count = len(self.loaded) + len(self.missing) + len(self.mismatched)
        kind = "averaged weights" if self.averaged else "weights"
        other = f" (not its {'raw' if self.averaged else 'averaged'} ones)" if self.has_both else ""
        names = f", under the names of {self.library}" if self.library else ""
        parts = [f"{len(self.loaded)} of {count} tensors loaded from its {kind}{other}{names}"]
        for found, words in (
            (self.resized, "tables resized to the model's native size"),
            (self.adapted, "first layers adapted to the model's channels"),
            (self.missing, "missing from the file"),
            (self.mismatched, "of another shape in the file"),
            (self.unexpected, "of the file without a place in the model"),
            (self.foreign, "kinds of other objects left out"),
        ):
            if found:
                parts.append(f"{len(found)} {words}: {_some(found)}")
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
    check_joined(path)
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
    if not weights_in(state):
        raise UserError(f"{path} holds no weights{others}: give a file of tensors, as of model.state_dict().")
    return state


def check_joined(path: Path) -> None:
    """Raise UserError if the path is a folder of a checkpoint in parts, which its own library has to join first."""
    for pattern, command in _JOINERS.items():
        if path.is_dir() and next(path.glob(pattern), None):
            raise UserError(
                f"{path} is a checkpoint in parts: join it with `{command.format(path)}`, and give that file."
            )


def weights_in(
    content: Mapping[str, Any], averaged: bool = False, depth: int = _DEPTH
) -> dict[bool, dict[str, Tensor]]:
    """Return the weights in a checkpoint's content: the averaged ones under True, the others under False."""
    found: dict[bool, dict[str, Tensor]] = {}
    for nests, kind in ((_NESTS, averaged), (_AVERAGED_NESTS, True)):
        for inner in (content.get(nest) for nest in nests):
            if isinstance(inner, Mapping) and depth:
                found = weights_in(inner, kind, depth - 1) | found
    own = {name: value for name, value in content.items() if torch.is_tensor(value) and isinstance(name, str)}
    return found or ({averaged: own} if own else {})


def choose_weights(content: Mapping[str, Any], averaged: bool) -> tuple[dict[str, Tensor], bool]:
    """Return the weights in a checkpoint's content, and whether they are averaged, as wished if there are both."""
    found = weights_in(content)
    kind = averaged if averaged in found else not averaged
    return found.get(kind, {}), kind


def fit_channels(state: Mapping[str, Tensor], own: Mapping[str, Tensor], in_chans: int) -> dict[str, Tensor]:
    """Return the layers of `state` that read RGB images, adapted to a model with `in_chans` channels by timm's rule.

    One channel gets the sum of the three; more get copies of them in turn, scaled so that their sum stays the same.
    """
    adapted = {}
    for name, tensor in state.items():
        place = own.get(name)
        if place is None or not place.ndim == tensor.ndim > 3 or tensor.shape[1] != 3 or in_chans == 3:
            continue
        if not tensor.is_floating_point():
            continue
        if place.shape == (len(tensor), in_chans, *tensor.shape[2:]):
            adapted[name] = adapt_input_conv(in_chans, tensor.flatten(3)).view(place.shape)
    return adapted


def load_checkpoint(
    model: nn.Module, path: str | Path, strict: bool = True, ema: bool | None = None, skip: Collection[str] = ()
) -> LoadReport:
    """Load a published or own weights file, or one of timm, transformers or OpenMMLab, into a model.

    Position tables with another native size are resized, and the first layer is adapted to the model's channels (and
    both are reported).

    Args:
        model: a model of anyres, which is unchanged if an error is raised.
        path: the file (see `read_state`).
        strict: everything must match; otherwise whatever matches is loaded and the rest is reported.
        ema: which weights to take if the file has averaged ones too: those, the others, or (None) those that the
            authors report results of. A file with one kind is loaded anyway.
        skip: beginnings of the names of parameters that keep their values.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged, or its weights are those of a different model.
    """
    if not isinstance(model, Backbone):
        raise UserError(
            f"load_checkpoint fills models of anyres, not a {type(model).__name__}: build it with create_model."
        )
    own = model.state_dict()
    dense = getattr(model, "dense", False)
    file = read_state(path)
    content, averaged = choose_weights(file, model.averaged if ema is None else ema)
    state, library = best(model.readings(content, part=dense), own, part=dense)
    tables = {
        name: tensor
        for name, tensor in state.items()
        if name in own and tensor.numel() and tensor.is_floating_point() and tensor.ndim == own[name].ndim
    }
    resized = model.fit_tables(tables)
    adapted = fit_channels(state, own, model.in_chans)
    state |= resized | adapted
    report = LoadReport(
        resized=list(resized),
        adapted=list(adapted),
        foreign=list(file.foreign),
        library=library,
        averaged=averaged,
        has_both=len(weights_in(file)) == 2,
    )
    if dense:  # a file of the whole network is fine too; its classifier is not needed
        state = {name: tensor for name, tensor in state.items() if name in own or not name.startswith(_CLASSIFIER)}
    passed = tuple(skip)
    for name, tensor in state.items():
        if name.startswith(passed):
            continue
        if name not in own:
            if not name.endswith(_COUNTERS):
                report.unexpected.append(name)
        elif tensor.shape != own[name].shape:
            report.mismatched.append(f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}")
        elif not hub.fits(tensor, own[name]):
            report.mismatched.append(f"{name} {hub.describe(tensor)} for {hub.describe(own[name])}")
        else:
            report.loaded.append(name)
    wanted = [name for name in own if not name.startswith(passed) and not name.endswith(_COUNTERS)]
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
            else "give a file of this model, under the authors' names or those of a library that docs/weights.md lists"
            if not report.loaded
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
