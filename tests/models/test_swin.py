from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from anyres.layers.windows import window_rule
from anyres.models.swin import PatchMerging, ShiftedWindowAttention, WindowMixing

GRIDS = [(8, 12), (9, 10), (3, 9), (2, 3), (4, 8), (4, 6), (1, 1), (5, 5)]


def windows(grid: tuple[int, int], size: int, offset: int) -> list[list[tuple[int, int]]]:
    """Tokens (row, column) of a map grouped by the window they are in; the first window ends before `offset`."""
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row, column in product(*map(range, grid)):
        groups.setdefault(((row - offset) // size, (column - offset) // size), []).append((row, column))
    return list(groups.values())


def attention_token_by_token(attn: ShiftedWindowAttention, x_HWC: Tensor, shift: int) -> Tensor:
    M, heads = attn.window_size, attn.num_heads
    q, k, v = attn.qkv(x_HWC).unflatten(-1, (3, heads, -1)).unbind(2)
    mixed = torch.empty_like(q)
    height, width, _ = x_HWC.shape
    for tokens in windows((height, width), M, shift):
        for r, c in tokens:
            bias = torch.stack([attn.bias_table[:, r - i + M - 1, c - j + M - 1] for i, j in tokens])
            products = torch.stack([(q[r, c] * k[i, j]).sum(-1) for i, j in tokens])
            weights = (products * q.shape[-1] ** -0.5 + bias).softmax(0)  # (tokens, heads)
            values = torch.stack([v[i, j] for i, j in tokens])
            mixed[r, c] = (weights[..., None] * values).sum(0)
    return attn.proj(mixed.flatten(2))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shifted", [False, True])
@torch.inference_mode()
def test_attention_stays_among_the_real_tokens_of_a_window(grid: tuple[int, int], shifted: bool) -> None:
    torch.manual_seed(0)
    attn = ShiftedWindowAttention(8, 2, 4, shifted, dense=False)
    attn.bias_table.normal_()
    x = torch.randn(1, *grid, 8)
    shift = 2 if shifted and min(grid) > 4 else 0
    assert torch.allclose(attn(x)[0], attention_token_by_token(attn, x[0], shift), atol=1e-6)


@torch.inference_mode()
def test_the_dense_form_attends_to_padding_and_always_shifts() -> None:
    attn = ShiftedWindowAttention(8, 2, 4, True, dense=True)
    for parameter in attn.parameters():
        parameter.normal_(std=0.5)
    x = torch.randn(1, 3, 6, 8)
    padded = torch.zeros(1, 4, 8, 8)
    padded[:, :3, :6] = x
    assert torch.allclose(attn(x), attn(padded)[:, :3, :6], atol=1e-6)
    assert torch.allclose(attn(padded)[0], attention_token_by_token(attn, padded[0], 2), atol=1e-6)


@pytest.mark.parametrize("grid", [(14, 7), (14, 21), (9, 10), (3, 5)])
@pytest.mark.parametrize("shifted", [False, True])
@torch.inference_mode()
def test_mixing_pads_four_before_and_three_after(grid: tuple[int, int], shifted: bool) -> None:
    """With M = 7 the two padding widths differ."""
    mixing = WindowMixing(4, 2, 7, shifted)
    mixing.weight.normal_()
    mixing.bias.normal_()
    x = torch.randn(1, *grid, 4)
    before = 4 if shifted and min(grid) > 7 else 0
    matrix, offset = mixing.weight.view(2, 49, 49), mixing.bias.view(2, 49)
    expected = torch.empty(*grid, 2, 2)
    for tokens in windows(grid, 7, -before):
        places = [(r + before) % 7 * 7 + (c + before) % 7 for r, c in tokens]
        values = torch.stack([x[0, r, c].view(2, 2) for r, c in tokens])  # (tokens, heads, channels)
        for (r, c), place in zip(tokens, places, strict=True):
            weights = matrix[:, place, places].T  # (tokens, heads)
            expected[r, c] = (weights[..., None] * values).sum(0) + offset[:, place, None]
    assert torch.allclose(mixing(x)[0], expected.flatten(2), atol=1e-5)


def test_window_rule() -> None:
    assert window_rule((56, 56), 7) == ((7, 7), (3, 3))
    assert window_rule((7, 14), 7) == ((7, 7), (0, 0))
    assert window_rule((8, 11), 7) == ((7, 7), (3, 3))
    assert window_rule((3, 20), 7) == ((3, 7), (0, 0))


def test_merging_reads_its_cell_column_by_column() -> None:
    merging = PatchMerging(1, 4)
    merging.set_submodule("norm", torch.nn.Identity())
    torch.nn.init.eye_(merging.reduction.weight)
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6]])[None, :, :, None]
    assert merging(x).tolist() == [[[[1, 4, 2, 5], [3, 6, 0, 0]]]]
