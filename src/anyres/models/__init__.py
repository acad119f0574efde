"""One file per paper. Each ends in a `FAMILY`; `anyres.models._registry` finds it by that name."""
