"""Model folders in the format of timm, transformers and the Hugging Face Hub: `config.json` and `model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anyres.errors import UserError, first_line
from anyres.io import files
from anyres.io.parsing import read_json
from anyres.io.text import printable
from anyres.options import LARGEST, is_kind

CONFIG, WEIGHTS, CARD = NAMES = "config.json", "model.safetensors", "README.md"
PREPROCESSOR = "preprocessor_config.json"
"""What transformers keeps about the preparation of images."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
KIND = "model"
"""Kind of these files in a folder's record (see `anyres.io.files`)."""


def write_folder(folder: str | Path, config: dict[str, Any], state: dict[str, Tensor], pipeline: str) -> Path:
    """Write a model folder atomically.

    `config` has timm's layout (architecture, model_args, pretrained_cfg, …), and `pipeline` is the Hub's name for the
    task. Raises UserError under the conditions of `check_target`.
    """
    folder = Path(folder)
    _adopt(folder)
    with files.atomic_folder(folder, KIND, NAMES) as temporary:
        save_file(
            {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()},
            temporary / WEIGHTS,
            metadata={"format": "pt"},
        )
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, default=list) + "\n", encoding="utf-8")
        (temporary / CARD).write_text(model_card(config, pipeline), encoding="utf-8")
    return folder


def check_target(folder: str | Path) -> None:
    """Raise UserError if `folder` exists and is not exactly a model as left by `write_folder`.

    Even an edited model card counts as a change and is kept.
    """
    folder = Path(folder)
    _adopt(folder)
    files.check_folder(folder, KIND, NAMES)


def _adopt(folder: Path) -> None:
    """Add a record to a folder of version 0.1 that has only its own files, our config and an unedited card."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != set(NAMES):
        return
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        card = (folder / CARD).read_text(encoding="utf-8")
        pipeline = re.search(r"^pipeline_tag: (\S+)$", card, flags=re.M)
        is_ours = pipeline is not None and "anyres" in config and card == model_card(config, pipeline[1])
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):  # any config.json
        return
    if is_ours:
        files.adopt(folder, KIND, NAMES)


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a model folder; returns (config, state).

    Raises FileNotFoundError, and UserError for a damaged file or for impossible values in the config.
    """
    return files.read_whole(folder, _read)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: give the folder of a saved model, such as RUN/best.")
    return check_config(folder / CONFIG), read_weights(folder / WEIGHTS)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises UserError if it is damaged."""
    try:
        return dict(load_file(path))
    except MemoryError:
        raise
    except Exception as error:  # damaged files cause errors in the library's parser, torch's dtypes and the memory map
        raise UserError(
            f"{path} is damaged or no weights file ({first_line(error)}): restore it from a copy, or download it again."
        ) from error


def _is_size(value: Any, count: int) -> bool:
    numbers = isinstance(value, list) and len(value) == count and all(is_kind(side, int) for side in value)
    return numbers and all(1 <= side <= 65536 for side in value)


def _is_colours(value: Any) -> bool:
    return is_kind(value, Sequence[float]) and 1 <= len(value) <= 64


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architecture": (lambda value: is_kind(value, str), "a text"),
    "task": (lambda value: is_kind(value, str), "a text"),
    "num_classes": (lambda value: is_kind(value, int) and value >= 0, f"a whole number from 0 to {LARGEST}"),
    **dict.fromkeys(
        ("model_args", "options", "backbone", "pretrained_cfg", "anyres"),
        (lambda value: isinstance(value, dict), "`name: value` pairs"),
    ),
    "input_size": (lambda value: _is_size(value, 3), "three whole numbers: channels, height, width"),
    "train_sizes": (
        lambda value: isinstance(value, list) and len(value) > 0 and all(_is_size(size, 2) for size in value),
        "a list of pairs: height, width",
    ),
    "mean": (_is_colours, "a list of numbers, one for each channel"),
    "std": (
        lambda value: _is_colours(value) and min(value) > 0,
        "a list of numbers above 0, one for each channel",
    ),
    "crop_pct": (lambda value: is_kind(value, float) and 0 < value <= 1, "a number above 0 and at most 1"),
    "interpolation": (
        lambda value: is_kind(value, str) and value in INTERPOLATIONS,
        f"one of {', '.join(INTERPOLATIONS)}",
    ),
    "label_names": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of texts",
    ),
    "longest": (lambda value: is_kind(value, float) and value >= 1, "a number of at least 1"),
    "frame_stride": (lambda value: is_kind(value, float) and value > 0, "a number above 0"),
    **dict.fromkeys(
        ("divisor", "num_frames"), (lambda value: is_kind(value, int) and value >= 1, "a whole number of at least 1")
    ),
    "reduce_zero_label": (lambda value: isinstance(value, bool), "true or false"),
}
"""Required types of the entries of config.json, and of its sections pretrained_cfg and anyres."""


def check_config(path: Path) -> dict[str, Any]:
    """Return a folder's config.json without null entries. Raises UserError if it is unusable."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no `name: value` pairs: restore it from a copy.")

    def checked(part: dict[str, Any], place: str = "") -> dict[str, Any]:
        part = {name: value for name, value in part.items() if value is not None}
        for name in part.keys() & _RULES.keys():
            rule, words = _RULES[name]
            if not rule(part[name]):
                raise UserError(f"{path}: {place}{name} is {part[name]!r:.80}; it must be {words}: correct it.")
        return part

    if "model_type" in config and "architecture" not in config:  # of transformers
        return _of_transformers(config, path.parent)
    config = checked(config)
    if "architecture" not in config:
        raise UserError(f"{path} names no architecture: give the folder of a saved model, such as RUN/best.")
    for part in ("pretrained_cfg", "anyres", "backbone"):
        if part in config:
            config[part] = checked(config[part], f"{part}.")
    for part in ("pretrained_cfg", "anyres"):
        names, count = config.get(part, {}).get("label_names"), config.get("num_classes")
        if names and len(names) != count:
            raise UserError(f"{path}: {part}.label_names has {len(names)} names for num_classes {count}: correct one.")
    return config


def _of_transformers(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a config of transformers, and that of its preprocessor, in timm's layout, without an architecture."""
    names = config.get("id2label")
    names = [names.get(str(number)) for number in range(len(names))] if isinstance(names, dict) else []
    images = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    found: dict[str, Any] = {"label_names": names} if names and all(isinstance(name, str) for name in names) else {}
    for key in ("mean", "std"):
        value = images.get(f"image_{key}") if isinstance(images, dict) else None
        if value is not None and not _RULES[key][0](value):
            raise UserError(f"{folder / PREPROCESSOR}: image_{key} must be {_RULES[key][1]}: correct it.")
        found |= {} if value is None else {key: value}
    return {"model_type": config["model_type"], "num_classes": len(names) or 2, "pretrained_cfg": found}


class _Bounded(TorchFunctionMode):
    """Aborts code that makes too many torch calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise UserError("config.json describes a network far larger than the weights: restore the folder.")
        return func(*args, **(kwargs or {}))


def fits(tensor: Tensor, place: Tensor) -> bool:
    """Return whether a tensor can be loaded into another: same shape and same kind of dtype, in any precision."""
    kinds = [(each.is_floating_point(), each.is_complex()) for each in (tensor, place)]
    return tensor.shape == place.shape and kinds[0] == kinds[1]


def describe(tensor: Tensor) -> str:
    """Return a tensor's shape and dtype as text."""
    return f"{'x'.join(map(str, tensor.shape)) or 'one'} {str(tensor.dtype).removeprefix('torch.')}"


Network = TypeVar("Network", bound=nn.Module)


def outline(build: Callable[[], nn.Module], count: int) -> dict[str, Tensor]:
    """Return the state dict, without any memory, of the network that `build` creates for `count` weights.

    Raises UserError if the network is far larger than those.
    """
    with torch.device("meta"), _Bounded(20_000 + 200 * count):
        return build().state_dict()


def with_weights(build: Callable[[], Network], state: dict[str, Tensor]) -> Network:
    """Return the network that `build` creates, in eval mode, with these weights.

    The weights are compared with the network before it takes any memory. Raises UserError if they do not match.
    """
    wanted = outline(build, len(state))
    for name in dict.fromkeys([*wanted, *state]):
        if name not in state:
            problem = "is missing"
        elif name not in wanted:
            problem = "belongs to nothing"
        elif not fits(state[name], wanted[name]):
            problem = f"is {describe(state[name])} in place of {describe(wanted[name])}"
        else:
            continue
        raise UserError(f"the weights are not those of config.json ({name:.80} {problem}): restore the folder.")
    network = build()
    network.load_state_dict(state)
    return network.eval()


def find_folder(name: str | Path) -> Path:
    """Return a local folder for `name`: a folder, `local-dir:FOLDER`, or `hf-hub:OWNER/NAME[@REVISION]`.

    A folder on the Hub is downloaded first, and cached.
    """
    text = str(name)
    if not text.startswith("hf-hub:"):
        return Path(text.removeprefix("local-dir:"))
    from huggingface_hub import snapshot_download

    repository, _, revision = text.removeprefix("hf-hub:").partition("@")
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS, CARD, PREPROCESSOR]
            )
        )
    except Exception as error:  # the hub library raises many kinds, including network errors
        raise UserError(
            f"{text} cannot be downloaded ({first_line(error)}): check the name, the network, and for closed models "
            "`hf auth login`."
        ) from error


def upload_folder(folder: str | Path, repository: str, private: bool = False) -> str:
    """Upload a model folder to the repository OWNER/NAME on the Hub, creating it if needed; returns its URL.

    A model card that is already there is kept.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repository, private=private, exist_ok=True)
    # An existing model card may have been edited by someone.
    names = [CONFIG, WEIGHTS] if api.file_exists(repository, CARD) else list(NAMES)
    api.upload_folder(folder_path=folder, repo_id=repository, allow_patterns=names)
    return str(address)


def split_pretrained_cfg(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split entries into (those of timm's PretrainedCfg, the rest); timm rejects a pretrained_cfg with unknown keys."""
    from timm.models import PretrainedCfg

    known = {field.name for field in dataclasses.fields(PretrainedCfg)} - {"url", "file", "state_dict", "source"}
    values = {key: value for key, value in values.items() if value is not None}
    if len(values.get("label_names", ())) != values.get("num_classes"):  # they belong to an earlier head
        values.pop("label_names", None)
    return {k: v for k, v in values.items() if k in known}, {
        k: v for k, v in values.items() if k not in known | {"url", "file", "state_dict", "source"}
    }


def model_card(config: dict[str, Any], pipeline: str) -> str:
    """Return the folder's README.md, with the header that the Hub reads."""
    cfg = config.get("pretrained_cfg", {})
    own = config.get("anyres", {})
    sizes = ", ".join("x".join(map(str, size)) for size in own.get("train_sizes", [])) or "not recorded"
    task = config.get("task")
    library = "timm" if task is None else "anyres"  # timm can build only the classifiers
    name = config["architecture"] if task is None else f"{config['backbone']['architecture']} for {task}"
    data, base = (str(own.get(key) or "") for key in ("data", "base_model"))
    header = {
        "library_name": library,
        "pipeline_tag": pipeline,
        "license": str(cfg.get("license") or "other").lower(),
        **({"datasets": [data.removeprefix("hf:")]} if data.startswith("hf:") else {}),
        **({"base_model": base.removeprefix("hf-hub:")} if base.startswith("hf-hub:") else {}),
        "tags": [pipeline, library, "multi-resolution"],
    }
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---
# {_plain(name)}

A network of {config["num_classes"]} classes made with anyres. It takes inputs of any height and width.
Training sizes: {_plain(sizes)}.
{f"Training data: {_plain(data)}.{chr(10)}" if data else ""}\
{f"Started from: {_plain(base)}.{chr(10)}" if base else ""}
```python
import anyres

model = anyres.load_pretrained("PATH OR hf-hub:OWNER/NAME")
```
"""


_SWEEP = "\n## Score by input size\n"


def add_sweep(folder: Path, about: str, table: Sequence[Sequence[str]]) -> bool:
    """Put a table (header, lines) and a sentence about it at the end of a folder's model card, in place of an earlier
    one. A card that somebody edited stays as it is; returns whether the table is in it."""
    card = folder / CARD
    if not card.is_file() or files.is_damaged(card, KIND) or not files.is_recorded(folder, KIND):
        return False
    header, *lines = [[_plain(cell) for cell in line] for line in table]
    rows = [header, ["---"] * len(header), *lines]
    text = card.read_text(encoding="utf-8").partition(_SWEEP)[0]
    with files.atomic_write(card, KIND) as temporary:
        written = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        temporary.write_text(f"{text}{_SWEEP}\n{_plain(about)}\n\n{written}", encoding="utf-8")
    return True


def _plain(text: str) -> str:
    """Escape text so that Markdown shows it unchanged."""
    return re.sub(r"([\\`*\[\]<>&|#])", r"\\\1", printable(text))
