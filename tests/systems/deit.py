from __future__ import annotations

SMALL = {"*": {"embed_dim": 48, "depth": 3, "num_heads": 3}}
