from __future__ import annotations

import torch

from anyres.layers.windows import partition
from anyres.models.msg_transformer import MessengerAttention, MSGTransformer, shuffle


def test_whole_regions_swap_their_chunks() -> None:
    """(B, R, G, C) seen as (B, R, G, G, C/G) with its two G axes swapped."""
    messengers = torch.randn(2, 4 * 6, 8)  # 2 x 3 regions of 2 x 2 windows
    regions = partition(messengers.view(2, 4, 6, 8), (2, 2))
    expected = regions.view(2, 6, 4, 4, 2).transpose(2, 3).reshape(regions.shape)
    assert torch.equal(partition(shuffle(messengers, (4, 6), 2).view(2, 4, 6, 8), (2, 2)), expected)


def test_without_a_partner_a_chunk_stays() -> None:
    messengers = torch.arange(3 * 4.0).view(1, 3, 4)  # a row of three windows, regions of 2 x 2
    assert shuffle(messengers, (1, 3), 2)[0].tolist() == [[0, 4, 2, 3], [1, 5, 6, 7], [8, 9, 10, 11]]
    assert torch.equal(shuffle(shuffle(messengers, (1, 3), 2), (1, 3), 2), messengers)


@torch.inference_mode()
def test_padding_is_no_key_and_a_small_window_keeps_its_offsets() -> None:
    attn = MessengerAttention(8, 2, 4)
    for parameter in attn.parameters():
        parameter.normal_(std=0.5)
    messenger, x = torch.randn(1, 1, 1, 8), torch.randn(1, 3, 2, 8)
    alone = attn(torch.cat((messenger, x.view(1, 1, 6, 8)), 2), (3, 2), (3, 2), (1, 1))
    padded = torch.randn(1, 4, 4, 8)
    padded[:, :3, :2] = x
    tokens = torch.cat((messenger, padded.view(1, 1, 16, 8)), 2)
    inside = attn(tokens, (3, 2), (4, 4), (1, 1))
    real = inside[:, :, 1:].view(1, 4, 4, 8)[:, :3, :2]
    assert torch.allclose(alone[:, :, 0], inside[:, :, 0], atol=1e-6)
    assert torch.allclose(alone[:, :, 1:].view(1, 3, 2, 8), real, atol=1e-6)


def test_gradients_or_not_the_numbers_are_the_same() -> None:
    """Without gradients the messengers are shuffled in place."""
    model = MSGTransformer(16, (1, 1, 1, 1), (1, 2, 2, 4), num_classes=5).eval()
    x = torch.randn(1, 3, 250, 160)
    with torch.no_grad():
        fast = model(x)
    assert torch.allclose(model(x), fast, atol=1e-6)
