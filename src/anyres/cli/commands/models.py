"""`anyres models`."""

from __future__ import annotations

from typing import Literal

from anyres.cli.terminal import (
    print_csv,
    print_table,
)
from anyres.errors import UserError


def models(pattern: str = "*", *, layout: Literal["table", "csv"] = "table") -> None:
    """List the models with their published results.

    Args:
        pattern: part of a name, or a shell pattern such as deit_*_384
        layout: print a readable table or CSV
    """
    from anyres.models._registry import list_models, model_info

    names = list_models(pattern)
    if not names:
        raise UserError(f"No model matches {pattern!r}; `anyres models` lists them all.")
    rows = []
    for name in names:
        info = model_info(name)
        native = info["native_size"]
        trained = ", ".join(map(str, info["train_sizes"]))
        best = info["top1"].get(native[0]) if info["benchmark"] == "ImageNet-1k" else None
        rows.append(
            [name, f"{info['parameters'] / 1e6:.2f}", trained, "" if best is None else f"{best:.1f}", info["licence"]]
        )
    header = ["model", "parameters (M)", "trained at", "top-1 (%)", "licence"]
    if layout == "csv":
        print_csv(header, rows)
    else:
        print_table(header, rows)
