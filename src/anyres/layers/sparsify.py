"""Dynamic token sparsification: score tokens, keep the best, and, in training, sample what would be kept.

At test time a fixed share of the tokens is selected by top-k and the others are really left out. In training every
token stays, a binary decision is sampled per token with the straight-through Gumbel estimator, and attention ignores
the tokens decided against (DynamicViT, Rao et al., NeurIPS 2021, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.errors import UserError
from anyres.layers.attention import Attention
from anyres.layers.parts import parts_of
from anyres.shapes import Grid

# Scores -----------------------------------------------------------------------------------------------------------


class ScorePredictor(nn.Module):
    """The prediction module (equations 1 to 5): one half of the embedding speaks for the token, the mean of the other
    half for the image, and a small network turns both into two log-probabilities, of keeping and of dropping."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.embed = nn.Linear(dim, dim)
        parts_of(dim, 2, what="halves")
        self.fc1 = nn.Linear(dim, dim // 2)
        self.fc2 = nn.Linear(dim // 2, dim // 4)
        self.fc3 = nn.Linear(dim // 4, 2)

    def forward(self, x_BNC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
        """(B, N, C) → log-probabilities (B, N, 2). The image's half is the mean over the tokens in `keep_BN` (1 or 0),
        or over all. Autocast is off here: in bfloat16 most scores of an image tie."""
        with torch.autocast(x_BNC.device.type, enabled=False):
            z_BNC = self.embed(self.norm(x_BNC.to(self.norm.weight.dtype)))
            local, image = F.gelu(z_BNC).chunk(2, dim=-1)
            mean = masked_mean(image, keep_BN)[:, None].expand_as(image)
            hidden = F.gelu(self.fc1(torch.cat((local, mean), dim=-1)))
            return self.fc3(F.gelu(self.fc2(hidden))).log_softmax(dim=-1)


def masked_mean(x_BNC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
    """The mean over the tokens in `keep_BN` (1 or 0), or over all: (B, C). Zero where nothing is kept."""
    if keep_BN is None:
        return x_BNC.mean(1)
    return (x_BNC * keep_BN[..., None]).sum(1) / keep_BN.sum(1, keepdim=True).clamp(min=1e-6)


def check_places(prune_before: Sequence[int], depth: int) -> tuple[int, ...]:
    """The blocks with a predictor in front. Error: UserError unless they rise and exist."""
    if list(prune_before) != sorted({*prune_before} & {*range(depth)}):
        raise UserError(f"prune_before={tuple(prune_before)} must rise and be below the {depth} blocks there are.")
    return tuple(prune_before)


# Selection at test time ---------------------------------------------------------------------------------------------


def keep_count(tokens: int, ratio: float) -> int:
    """How many of so many tokens stay: rounded down, as the published code does it in floating point, but one at
    least."""
    return max(int(tokens * ratio), 1)


def split_by_score(score_BN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions of the `count` highest scores (B, count) and of the others (B, N - count), both ascending."""
    order = score_BN.argsort(dim=1, descending=True)
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values


def flat_rows(positions_Bn: Tensor, tokens: int) -> Tensor:
    """Positions in each image's `tokens` tokens → rows (B·n) of the batch's flattened tokens."""
    first = torch.arange(positions_Bn.shape[0], device=positions_Bn.device) * tokens
    return (positions_Bn + first[:, None]).flatten()


def gather_tokens(x_BNC: Tensor, positions_Bn: Tensor) -> Tensor:
    """The tokens at these positions: (B, n, C)."""
    rows = x_BNC.flatten(0, 1).index_select(0, flat_rows(positions_Bn, x_BNC.shape[1]))
    return rows.unflatten(0, positions_Bn.shape)


def keep_mask(positions_Bn: Tensor, tokens: int) -> Tensor:
    """(B, N) float32, 1 at the positions and 0 elsewhere."""
    mask = torch.zeros(positions_Bn.shape[0], tokens, device=positions_Bn.device)
    return mask.scatter(1, positions_Bn, 1.0)


def two_paths(
    x_BHWC: Tensor,
    slow_rows: Tensor,
    fast_rows: Tensor,
    slow: Callable[[Tensor], Tensor],
    fast: Callable[[Tensor], Tensor],
) -> Tensor:
    """A new map: `slow` of some rows of the flattened map (B·H·W, C), `fast` of all others."""
    rows = x_BHWC.flatten(0, 2)
    slow_out, fast_out = slow(rows[slow_rows]), fast(rows[fast_rows])
    out = torch.empty_like(rows, dtype=slow_out.dtype)
    return out.index_copy_(0, slow_rows, slow_out).index_copy_(0, fast_rows, fast_out).view(x_BHWC.shape)


# Decisions in training ----------------------------------------------------------------------------------------------


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise of this shape."""
    return -torch.empty_like(like).exponential_().log()


def decide(log_probs_BN2: Tensor) -> Tensor:
    """A sample of "keep" per token (B, N), 1 or 0, whose gradient is that of its relaxation at temperature 1 (straight-
    through Gumbel-softmax, section 3.3)."""
    noisy = log_probs_BN2 + gumbel_noise(log_probs_BN2)
    soft = noisy.softmax(dim=-1)[..., 0]
    hard = (noisy[..., 0] >= noisy[..., 1]).to(soft.dtype)
    return hard - soft.detach() + soft


def merge(keep: Tensor, slow: Tensor, fast: Tensor) -> Tensor:
    """The slow map where `keep` is 1, the fast one where it is 0; with a gradient to `keep`."""
    return keep * slow + (1 - keep) * fast


class PolicyAttention(Attention):
    """Self-attention that can leave out keys (attention masking, equations 10 and 11).

    Without a decision it is ordinary attention, so also over the survivors of a selection.
    """

    def forward(  # type: ignore[override]  # no grid: the tokens that are left form none
        self, x_BNC: Tensor, queries: int | None = None, keep_BN: Tensor | None = None
    ) -> Tensor:
        """(B, 1 + N, C), class token first → the same, or its first `queries` rows.

        With `keep_BN` (1 or 0 per patch) every token attends to the class token, the patches kept and itself. The
        weights of the others stay a hair above zero: ε / n, which published training has too.
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
