"""The folder that timm, transformers and the Hugging Face Hub share: `config.json` beside `model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyres.errors import UserError
from anyres.files import atomic_folder, recover_folder

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def write_folder(folder: str | Path, config: dict[str, Any], state: dict[str, Tensor]) -> Path:
    """Write the folder whole or not at all. `config` follows timm's layout (architecture, model_args, pretrained_cfg,
    …)."""
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        save_file(
            {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()},
            temporary / WEIGHTS,
            metadata={"format": "pt"},
        )
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, default=list) + "\n")
        (temporary / CARD).write_text(model_card(config))
    return folder


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read such a folder: (config, state). Errors: FileNotFoundError, UserError for a damaged file."""
    folder = Path(folder)
    recover_folder(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}: give a folder written by save_pretrained, such as RUN/best."
            )
    try:
        config = json.loads((folder / CONFIG).read_text())
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
    """Create the model repository OWNER/NAME on the Hub if need be and upload the folder. Returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repository)
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
    licence = str(cfg.get("license") or "other").lower()
    task = config.get("task")
    tag = _PIPELINES[task]
    library = "timm" if task is None else "anyres"  # timm can build the classifiers alone
    name = config["architecture"] if task is None else f"{config['backbone']['architecture']} for {task}"
    return f"""---
library_name: {library}
pipeline_tag: {tag}
license: {licence}
tags:
- {tag}
- {library}
- multi-resolution
---
# {name}

A network of {config["num_classes"]} classes made with anyres. It takes inputs of any height and width.
Training sizes: {sizes}.

```python
import anyres

model = anyres.load_pretrained("PATH OR hf-hub:OWNER/NAME")
```
"""
