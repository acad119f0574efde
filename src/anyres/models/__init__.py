"""The models, one file per paper; `anyres.models._registry` finds the `Family` objects in each file."""
