"""One file per paper. Each ends in a `FAMILY`; `anyres.registry` finds it by that name."""
