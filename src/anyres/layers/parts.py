"""Checking that a number splits into equal parts."""

from __future__ import annotations

from anyres.errors import UserError


def parts_of(total: int, parts: int, whole: str = "channels", what: str = "heads") -> int:
    """Return `parts`, the number of parts. Raises UserError if it does not divide `total`."""
    if parts < 1 or total % parts:
        raise UserError(
            f"{total} {whole} cannot be split into {parts} {what}: choose a multiple of {parts or 'one or more'}."
        )
    return parts
