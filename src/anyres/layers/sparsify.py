"""Dynamic token sparsification: score tokens, keep the best, and sample these decisions in training.

At test time, top-k selects a fixed share of the tokens, and the others are really dropped. In training, every token
stays; a binary decision per token is sampled with the straight-through Gumbel estimator, and attention masks out the
tokens to drop (DynamicViT, Rao et al., NeurIPS 2021, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.errors import UserError
from anyres.layers.attention import Attention
from anyres.layers.parts import parts_of
from anyres.layers.sizes import at_least_one, floor_of_product
from anyres.shapes import Grid

# Scores -----------------------------------------------------------------------------------------------------------


class ScorePredictor(nn.Module):
    """The prediction module (equations 1 to 5).

    One half of the embedding describes the token, and the mean of the other half describes the image. A small network
    maps both to two log-probabilities, of keeping and of dropping the token.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.embed = nn.Linear(dim, dim)
        parts_of(dim, 2, what="halves")
        self.fc1 = nn.Linear(dim, dim // 2)
        self.fc2 = nn.Linear(dim // 2, dim // 4)
        self.fc3 = nn.Linear(dim // 4, 2)

    def forward(self, x_BNC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
        """Return log-probabilities (B, N, 2) for tokens (B, N, C).

        The image feature is the mean over the tokens in `keep_BN` (1 or 0), or over all. Autocast is off here, because
        in bfloat16 most scores of an image are tied.
        """
        with torch.autocast(x_BNC.device.type, enabled=False):
            z_BNC = self.embed(self.norm(x_BNC.to(self.norm.weight.dtype)))
            local, image = F.gelu(z_BNC).chunk(2, dim=-1)
            mean = masked_mean(image, keep_BN)[:, None].expand_as(image)
            hidden = F.gelu(self.fc1(torch.cat((local, mean), dim=-1)))
            return self.fc3(F.gelu(self.fc2(hidden))).log_softmax(dim=-1)


def masked_mean(x_BNC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
    """Return the mean (B, C) over the tokens in `keep_BN` (1 or 0), or over all; zero if nothing is kept."""
    if keep_BN is None:
        return x_BNC.mean(1)
    return (x_BNC * keep_BN[..., None]).sum(1) / keep_BN.sum(1, keepdim=True).clamp(min=1e-6)


def check_places(prune_before: Sequence[int], depth: int) -> tuple[int, ...]:
    """Return the blocks that have a predictor in front. Raises UserError unless they are increasing and exist."""
    if list(prune_before) != sorted({*prune_before} & {*range(depth)}):
        raise UserError(f"prune_before={tuple(prune_before)} must rise and be below the {depth} blocks there are.")
    return tuple(prune_before)


# Selection at test time ---------------------------------------------------------------------------------------------


def keep_count(tokens: int, ratio: float) -> int:
    """Return how many tokens to keep: rounded down in floating point as in the published code, but at least one."""
    return at_least_one(floor_of_product(tokens, ratio))


def split_by_score(score_BN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return positions of the `count` highest scores (B, count) and of the others (B, N - count), both ascending."""
    order = score_BN.argsort(dim=1, descending=True)
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values


def flat_rows(positions_Bn: Tensor, tokens: int) -> Tensor:
    """Convert positions among each image's `tokens` tokens to rows (B·n) of the batch's flattened tokens."""
    first = torch.arange(positions_Bn.shape[0], device=positions_Bn.device) * tokens
    return (positions_Bn + first[:, None]).flatten()


def gather_tokens(x_BNC: Tensor, positions_Bn: Tensor) -> Tensor:
    """Return the tokens at these positions, (B, n, C)."""
    rows = x_BNC.flatten(0, 1).index_select(0, flat_rows(positions_Bn, x_BNC.shape[1]))
    return rows.unflatten(0, positions_Bn.shape)


def keep_mask(positions_Bn: Tensor, tokens: int) -> Tensor:
    """Return (B, N) float32 with 1 at the positions and 0 elsewhere."""
    mask = torch.zeros(positions_Bn.shape[0], tokens, device=positions_Bn.device)
    return mask.scatter(1, positions_Bn, 1.0)


def two_paths(
    x_BHWC: Tensor,
    slow_rows: Tensor,
    fast_rows: Tensor,
    slow: Callable[[Tensor], Tensor],
    fast: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return a new map: `slow` applied to some rows of the flattened map (B·H·W, C), `fast` to all others."""
    rows = x_BHWC.flatten(0, 2)
    slow_out, fast_out = slow(rows[slow_rows]), fast(rows[fast_rows])
    out = torch.empty_like(rows, dtype=slow_out.dtype)
    return out.index_copy_(0, slow_rows, slow_out).index_copy_(0, fast_rows, fast_out).view(x_BHWC.shape)


# Decisions in training ----------------------------------------------------------------------------------------------


def gumbel_noise(like: Tensor) -> Tensor:
    """Return standard Gumbel noise with the shape of `like`."""
    return -torch.empty_like(like).exponential_().log()


def decide(log_probs_BN2: Tensor) -> Tensor:
    """Sample the decision to keep each token, (B, N) with 1 or 0.

    The gradient is that of the relaxation at temperature 1 (straight-through Gumbel-softmax, section 3.3).
    """
    noisy = log_probs_BN2 + gumbel_noise(log_probs_BN2)
    soft = noisy.softmax(dim=-1)[..., 0]
    hard = (noisy[..., 0] >= noisy[..., 1]).to(soft.dtype)
    return hard - soft.detach() + soft


def merge(keep: Tensor, slow: Tensor, fast: Tensor) -> Tensor:
    """Return the slow map where `keep` is 1 and the fast map where it is 0, with a gradient to `keep`."""
    return keep * slow + (1 - keep) * fast


class PolicyAttention(Attention):
    """Self-attention that can mask out keys (attention masking, equations 10 and 11).

    Without a decision it is ordinary attention, including over the tokens that remain after a selection.
    """

    def forward(  # type: ignore[override]  # no grid: the tokens that are left form none
        self, x_BNC: Tensor, queries: int | None = None, keep_BN: Tensor | None = None
    ) -> Tensor:
        """Apply attention to (B, 1 + N, C), class token first; returns the same shape, or only its first `queries`
        rows.

        With `keep_BN` (1 or 0 per patch), every token attends to the class token, the kept patches and itself. The
        weights of the other tokens are slightly above zero, ε / n, as in published training.
        """
        if keep_BN is None:
            one_row: Grid = (1, x_BNC.shape[1] - 1)
            return super().forward(x_BNC, one_row, (), queries)
        n, eps = x_BNC.shape[1], 1e-6
        q, k, v = self.qkv(x_BNC).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).float()
        policy = F.pad(keep_BN, (1, 0), value=1.0)[:, None, None, :]
        policy = policy + (1 - policy) * torch.eye(n, device=policy.device)
        weight = (logits - logits.amax(dim=-1, keepdim=True).detach()).exp() * policy
        attn = ((weight + eps / n) / (weight.sum(dim=-1, keepdim=True) + eps)).to(v.dtype)
        attn = F.dropout(attn, self.attn_drop, self.training)
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).flatten(2)))
