"""The `anyres` command."""
