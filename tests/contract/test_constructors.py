"""Values that no model can be built with end in one sentence, whatever the option."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anyres.errors import UserError
from anyres.models._registry import create_model, entries
from tests.contract.small import distinct_models, small_args

ODD: list[Any] = [
    0, -1, 1, 7, 10**9, 1.5, float("nan"), float("inf"), 1j, True, None, "", "x", b"x", {}, {1: 2}, [], [1], (3, 5, 7),
    [10**9] * 4, [0, 0, 0, 0], (1, 2, 3, 4), [3, 3, 3, 3], [2.5] * 4, ["L"] * 4, [[1]] * 4, [2] * 5,
]  # fmt: skip


ONE_OF_EACH = {entries()[name].family.model: name for name in distinct_models()}


@pytest.mark.parametrize("name", ONE_OF_EACH.values())
def test_odd_values(name: str) -> None:
    """Each option of each class with each odd value: it is built, or refused by UserError."""
    refused = []
    family, variant = entries()[name]
    for option in family.model._arguments():
        for value in ODD:
            try:
                with torch.device("meta"):
                    family.model(**{**variant.args, **small_args(name), option: value})
            except UserError as error:
                refused.append(str(error))
    assert len(refused) > 100
    assert max(map(len, refused)) < 400


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deit_tiny", {"patch_size": 0}, "patch_size of deit_tiny is 0; it must be a whole number from 1 to 65536"),
        ("deit_tiny", {"num_heads": 7}, "192 channels cannot be split into 7 heads"),
        ("deit_tiny", {"depth": "12"}, "depth .* is '12'; .* whole number"),
        ("deit_tiny", {"drop_rate": float("nan")}, "drop_rate .* is nan; .* from 0 to below 1"),
        ("deit_tiny", {"img_size": [224, 0]}, r"img_size .* is \[224, 0\]; .* two values"),
        ("swin_tiny", {"depths": (2, 2)}, "four values, one for each stage"),
        ("swin_tiny", {"num_heads": (5, 5, 5, 5)}, "96 channels cannot be split into 5 heads"),
        ("dat_tiny", {"groups": (1, 1, 1, 5)}, "24 heads cannot be split into 5 groups"),
        ("hatnet_tiny", {"kernels": (3, 3, 3, 4)}, "filter of 4x4 has no centre"),
        ("gpvit_l1", {"patch_size": 16}, "gpvit_l1 has no option 'patch_size'"),
        ("uvit_tiny", {"prefix_tokens": ["cls_token"]}, "uvit_tiny has no option 'prefix_tokens'"),
    ],
)
def test_one_sentence(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, **options)
