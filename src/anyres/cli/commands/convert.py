"""`anyres convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from anyres.cli.terminal import (
    say,
)
from anyres.errors import UserError


def convert(
    file: str,
    output: str,
    *,
    model: str | None = None,
    weights: Literal["auto", "raw", "averaged"] = "auto",
    to: Literal["anyres", "published"] = "anyres",
) -> None:
    """Convert a weights file from published parameter names, or those of timm, transformers or OpenMMLab, to those of
    anyres, or back to published ones.

    Args:
        file: a published weights file (.pth, .safetensors); with to=published also the folder of a saved model
        output: FILE.safetensors or FILE.pth for the weights only, or a folder for config.json and weights
        model: the architecture; by default, the only registered model that the file fits
        weights: which to take of a file with raw and averaged ones; by default those that the authors report results of
        to: the parameter names to convert to
    """
    from anyres.inference.modelspec import from_file, open_model
    from anyres.io.files import check_file
    from anyres.io.hub import check_target
    from anyres.models._backbone import Backbone
    from anyres.models._checkpoints import KINDS, save_weights
    from anyres.tasks import task_of

    is_file = Path(output).suffix in (".safetensors", ".pth")
    if not is_file and to == "published":
        raise UserError(
            f"{output} names a folder, but published weights are a single file: end it in .pth or .safetensors."
        )
    if Path(file).exists() and Path(output).exists() and Path(file).samefile(output):
        raise UserError(f"{output} is the input itself: choose another output.")
    if is_file:
        check_file(output, "weights")
    else:
        check_target(output)
    network = open_model(file)[1] if Path(file).is_dir() else None
    if network is None:
        if not Path(file).is_file():
            raise FileNotFoundError(f"There is no weights file {file}: check the path.")
        network = from_file(Path(file), model, KINDS[weights])
    if not isinstance(network, Backbone):
        raise UserError(f"{file} is a model for {task_of(network).name}, but only backbones can be converted.")
    state = network.state_dict()
    if to == "published":
        state = network.to_published(state)
    if is_file:
        save_weights(state, output)
    else:
        network.save_pretrained(output)
    say(f"wrote {output}: {len(state)} tensors of {str(network.architecture).removeprefix('anyres_')}")
