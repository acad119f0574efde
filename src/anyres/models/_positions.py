"""The position encodings of plain models: the named combinations and the options they consist of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator

from anyres.errors import UserError
from anyres.options import Options, Range, option


class Position(Options):
    """A combination of position encodings for a plain model, with at most one for each place where one can act."""

    tokens: Literal["table", "sine", "gpe"] | None = option(None, "Encoding that is added to the tokens once.")
    resize: Literal["bicubic", "bilinear"] = option("bicubic", "Interpolation that resizes the table of tokens=table.")
    logits: Literal["table", "continuous", "fire", "lookhere", "pape", "pape_ri"] | None = option(
        None, "Bias that is added to the attention logits."
    )
    rotary: bool = option(False, "Rotate queries and keys by their coordinates.")
    local: bool = option(False, "Add a convolution of the values to the attention output.")
    jitter: Range | None = option(None, "In training, scale the coordinates of rotary by a factor from this range.")
    log_scale: Literal["fixed", "learnt", "clamped"] | None = option(
        None, "Scale queries by the logarithm of the number of tokens (see LogScale)."
    )

    @model_validator(mode="after")
    def _jitter_has_coordinates(self) -> Self:
        if self.jitter is not None and not self.rotary:
            raise UserError(f"jitter={self.jitter} scales the coordinates of rotary=True: add that, or set jitter=None")
        return self

    @property
    def acts_between_tokens(self) -> bool:
        """Whether the attention itself needs the positions of all tokens at once."""
        return self.logits is not None or self.rotary or self.log_scale is not None


POSITIONS = {
    "none": Position(),
    "ape": Position(tokens="table"),
    "ape_bilinear": Position(tokens="table", resize="bilinear"),
    "sine": Position(tokens="sine"),
    "gpe": Position(tokens="gpe"),
    "lpe": Position(local=True),
    "glpe": Position(tokens="gpe", local=True),
    "rpb": Position(logits="table"),
    "cpb": Position(logits="continuous"),
    "fire": Position(logits="fire"),
    "lookhere": Position(logits="lookhere"),
    "pape": Position(logits="pape"),
    "pape_ri": Position(logits="pape_ri"),
    "rope": Position(rotary=True),
    "rlpe": Position(rotary=True, local=True, jitter=[0.75, 1.25], log_scale="fixed"),
}
"""Position encodings by name: the rows of ResFormer's ablation (Table 5), newer logit biases, rotary encodings, and
rotary + LPE."""


def choose_position(name: str, args: Mapping[str, Any] | None = None) -> Position:
    """Return the named position encoding with the fields in `args` changed. Raises UserError for unknown names."""
    if name not in POSITIONS:
        raise UserError(f"position={name!r} is not known: choose one of {', '.join(POSITIONS)}.")
    fields = Position.model_fields
    if not isinstance(args or {}, Mapping) or not fields.keys() >= (args or {}).keys():
        raise UserError(f"position_args={args!r:.200} must map names to values; there are {', '.join(fields)}.")
    try:
        return POSITIONS[name].changed(**(args or {}))
    except UserError as error:
        raise UserError(f"In position_args of position={name!r}, {error}.") from None
