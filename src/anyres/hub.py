"""The folder that timm, transformers and the Hugging Face Hub share: `config.json` beside `model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyres import files
from anyres.errors import UserError
from anyres.text import printable

CONFIG, WEIGHTS, CARD = NAMES = "config.json", "model.safetensors", "README.md"
KIND = "model"
"""What the record of a folder calls such files (`anyres.files`)."""


def write_folder(folder: str | Path, config: dict[str, Any], state: dict[str, Tensor]) -> Path:
    """Write the folder whole or not at all. `config` follows timm's layout (architecture, model_args, pretrained_cfg,
    …). Raises UserError where `check_target` does."""
    folder = Path(folder)
    check_target(folder)
    with files.atomic_folder(folder, KIND, NAMES) as temporary:
        save_file(
            {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()},
            temporary / WEIGHTS,
            metadata={"format": "pt"},
        )
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, default=list) + "\n")
        (temporary / CARD).write_text(model_card(config), encoding="utf-8")
    return folder


def check_target(folder: str | Path) -> None:
    """Raises UserError if `folder` exists and holds anything but a model as `write_folder` left it: even a model card
    that somebody edited is kept."""
    folder = Path(folder)
    if _lacks_record(folder):
        files.adopt(folder, KIND, NAMES)
    files.check_folder(folder, KIND, NAMES)


def _lacks_record(folder: Path) -> bool:
    """Whether version 0.1 wrote the folder, which kept no record: these files, our configuration and its very card."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != set(NAMES):
        return False
    try:
        config = json.loads((folder / CONFIG).read_text())
        return "anyres" in config and (folder / CARD).read_text() == model_card(config)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):  # any config.json at all
        return False


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read such a folder: (config, state). Errors: FileNotFoundError, UserError for a damaged file."""
    folder = files.existing(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: give the folder of a saved model, such as RUN/best.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return config, load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged ({error}): restore it from a copy or train again.") from error


def find_folder(name: str | Path) -> Path:
    """A local folder, `local-dir:FOLDER`, or `hf-hub:OWNER/NAME[@REVISION]`, which is downloaded (and cached) first."""
    text = str(name)
    if not text.startswith("hf-hub:"):
        return Path(text.removeprefix("local-dir:"))
    from huggingface_hub import snapshot_download

    repository, _, revision = text.removeprefix("hf-hub:").partition("@")
    return Path(snapshot_download(repository, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS, CARD]))


def upload_folder(folder: str | Path, repository: str, private: bool = False) -> str:
    """Create the model repository OWNER/NAME on the Hub if need be and upload the folder; a model card that is there
    already stays. Returns the address."""
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repository, private=private, exist_ok=True)
    # A model card that is there may be somebody's work.
    names = [CONFIG, WEIGHTS] if api.file_exists(repository, CARD) else list(NAMES)
    api.upload_folder(folder_path=folder, repo_id=repository, allow_patterns=names)
    return str(address)


def split_pretrained_cfg(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what timm's PretrainedCfg knows, the rest): timm refuses a config.json whose pretrained_cfg has unknown keys."""
    from timm.models import PretrainedCfg

    known = {field.name for field in dataclasses.fields(PretrainedCfg)} - {"url", "file", "state_dict", "source"}
    values = {key: value for key, value in values.items() if value is not None}
    return {k: v for k, v in values.items() if k in known}, {
        k: v for k, v in values.items() if k not in known | {"url", "file", "state_dict", "source"}
    }


_PIPELINES = {
    None: "image-classification",
    "segmentation": "image-segmentation",
    "detection": "object-detection",
    "video": "video-classification",
}
"""The Hub's name of a task."""


def model_card(config: dict[str, Any]) -> str:
    """README.md of the folder: the Hub reads the header, a person the rest."""
    cfg = config.get("pretrained_cfg", {})
    own = config.get("anyres", {})
    sizes = ", ".join("x".join(map(str, size)) for size in own.get("train_sizes", [])) or "not recorded"
    task = config.get("task")
    tag = _PIPELINES[task]
    library = "timm" if task is None else "anyres"  # timm can build the classifiers alone
    name = config["architecture"] if task is None else f"{config['backbone']['architecture']} for {task}"
    header = {
        "library_name": library,
        "pipeline_tag": tag,
        "license": str(cfg.get("license") or "other").lower(),
        "tags": [tag, library, "multi-resolution"],
    }
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---
# {_plain(name)}

A network of {config["num_classes"]} classes made with anyres. It takes inputs of any height and width.
Training sizes: {_plain(sizes)}.

```python
import anyres

model = anyres.load_pretrained("PATH OR hf-hub:OWNER/NAME")
```
"""


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]<>&|#])", r"\\\1", printable(text))
