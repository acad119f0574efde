from __future__ import annotations

SMALL = {"*": {"embed_dims": (16, 24, 48), "depths": (1, 1, 2), "num_heads": (1, 2, 3), "mlp_ratio": 2.0}}
OUTPUTS = {"cls": lambda model, x: list(model.forward_stages(x))[-1][1]}
FLOORS = True
