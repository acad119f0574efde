"""Writes docs/models.md from the registry: `uv run python docs/make_models.py`."""

from __future__ import annotations

from pathlib import Path

from anyres.models._published import Published, published
from anyres.models._registry import entries, model_info

HEAD = """# Models

All names work in `anyres.create_model` and in every command, and in timm with the prefix `anyres_`. The published names
work too. `anyres info NAME` prints the facts shown here. Top-1 is the accuracy on ImageNet-1k, or on the data named
beside it, that the authors report at the native size. `pretrained=True` downloads the authors' file where the last
column says "download"; other files have to be downloaded in a browser and given as `checkpoint_path=FILE`. A tag there
chooses another file of the same network, as in `create_model("swin_tiny.in22k_ft_in1k", pretrained=True)`.
`docs/make_models.py` generates this page from the model registry.

"""


def text() -> str:
    """Return the page as Markdown."""
    families: dict[int, list[str]] = {}
    for name, entry in entries().items():
        families.setdefault(id(entry.family), []).append(name)
    parts = [HEAD]
    for names in families.values():
        family = entries()[names[0]].family
        infos = [model_info(name) for name in names]
        parts.append(f"## {family.paper.partition(',')[0].partition(':')[0]} (`{names[0].split('_')[0]}`)\n\n")
        parts.append(f"{family.paper}. Weights: {family.repository} ({family.licence}).\n\n")
        parts.append(f"{family.size_policy} Minimum {max(info['minimum_size'] for info in infos)} px.\n\n")
        parts.append("| name | published as | parameters (M) | native size | top-1 (%) | weights |\n")
        parts.append("|---|---|--:|--:|--:|---|\n")
        for info in infos:
            size = info["native_size"]
            native = str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
            trained = info["train_sizes"]
            top1 = info["top1"].get(max(trained)) if trained and isinstance(trained[0], int) else None
            score = "–" if top1 is None else f"{top1}"
            if top1 is not None and info["benchmark"] != "ImageNet-1k":
                score += f" ({info['benchmark']})"
            first, *others = published()[info["name"]]
            weights = _place(first) + "".join(f", `{file.tag}`: {_place(file)}" for file in others)
            parts.append(
                f"| `{info['name']}` | {info['published_name']} | {info['parameters'] / 1e6:.2f} | {native} | "
                f"{score} | {weights} |\n"
            )
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


def _place(file: Published) -> str:
    """Say whether a program, a person or nobody can download a file."""
    if file.download:
        return "download"
    return f"[{file.service}]({file.url})" if file.url else "–"


if __name__ == "__main__":
    Path(__file__).with_name("models.md").write_text(text())
