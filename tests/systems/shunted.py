from __future__ import annotations

_TINY = {"embed_dims": (16, 24, 32, 48), "depths": (1, 2, 1, 1), "num_heads": (2, 2, 4, 3), "mlp_ratios": (2, 2, 2, 2)}
SMALL = {"*": _TINY}
FLOORS = True
