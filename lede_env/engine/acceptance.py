"""Which drafts survive verification: greedy prefix match, speculative sampling, and the coupling of the exit MDP.

Every random number is counter-based, a hash of (seed, row, how many were drawn before), so a result depends on
neither the batch it was computed in nor on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lede_env.arguments import number, whole_number
from lede_env.errors import LedeError

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_BELOW_ONE = 1.0 - 2.0**-53


def _mix(z: int) -> int:
    """The splitmix64 finaliser: a bijection of 64-bit integers with full avalanche."""
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)


def derive_seed(seed: int, *path: int) -> int:
    """The seed of a part (a row, an episode) of what `seed` governs; `derive_seed(seed)` is `seed` itself."""
    for step in path:
        seed = _mix((_mix(seed & _MASK) + (step + 1) * _GOLDEN) & _MASK)
    return seed


def derive_seeds(mixed: Tensor, steps: Tensor) -> Tensor:
    """`derive_seed(seed, step)` of (N,) pairs on their device, of each seed's `mix_seeds`; int64 of the same bits."""
    return mix_seeds(mixed + (steps + 1) * _signed(_GOLDEN))


def mix_seeds(z: Tensor) -> Tensor:
    """`_mix` of int64: its sums and products wrap as those of uint64 do, but its shift brings in the sign's bits."""
    z = (z ^ ((z >> 30) & (_MASK >> 30))) * _signed(_FIRST)
    z = (z ^ ((z >> 27) & (_MASK >> 27))) * _signed(_SECOND)
    return z ^ ((z >> 31) & (_MASK >> 31))


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return number - (number >> 63 << 64)


class Draws:
    """The uniform numbers in [0, 1) of one sequence."""

    def __init__(self, seed: int):
        self.key, self.count = _mix(seed & _MASK), 0

    def next(self) -> float:
        self.count += 1
        return (_mix((self.key + self.count * _GOLDEN) & _MASK) >> 11) * 2.0**-53


def first_uniforms(seeds: np.ndarray) -> np.ndarray:
    """(N,) uint64 seeds -> (N,) the first number that `Draws` gives for each."""
    keys: Any = _mix(cast(Any, seeds))  # its arithmetic is elementwise
    mixed: Any = _mix(keys + _GOLDEN)
    return (mixed >> 11) * 2.0**-53


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature, then top-k, then top-p (transformers' order). Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off

    def __post_init__(self) -> None:
        for name, plain in (("temperature", number), ("top_k", whole_number), ("top_p", number)):
            object.__setattr__(self, name, plain(name, getattr(self, name)))
        if self.temperature != 0.0 and not 1e-4 <= self.temperature < float("inf"):
            raise LedeError(f"temperature={self.temperature} must be 0 (greedy) or a positive number, at least 0.0001")
        if self.top_k < 0:
            raise LedeError(f"top_k={self.top_k} must be 0 (off) or a positive count of tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise LedeError(f"top_p={self.top_p} must lie in (0, 1]; 1 is off")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def filters(self) -> bool:
        """Whether top-k or top-p may leave tokens out of what is drawn from."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(N, V) logits -> (N, V) probabilities in float32, after temperature, top-k and top-p, renormalised."""
        scores = logits.float() / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            kth = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < kth, -torch.inf)
        if self.top_p < 1.0:
            ordered, order = scores.sort(dim=-1)
            tail = ordered.softmax(-1).cumsum(-1) <= 1.0 - self.top_p
            tail[..., -1] = False
            scores = scores.masked_fill(tail.scatter(-1, order, tail), -torch.inf)
        return scores.softmax(-1)


def best_tokens(logits: Tensor) -> np.ndarray:
    """(..., V) logits -> (...,) the most probable token of each."""
    if logits.device.type == "cpu":
        return logits.numpy().argmax(-1)  # a tenth of torch's time
    return logits.argmax(-1).cpu().numpy()


def draw(weights: Tensor, u: float) -> int:
    """A token from (V,) non-negative weights by inverse transform of one uniform number in [0, 1]."""
    return draw_rows(weights.unsqueeze(0), [u])[0]


def draw_rows(weights: Tensor, uniforms: Sequence[float]) -> list[int]:
    """A token from each row of (N, V) non-negative weights by inverse transform of its own uniform number."""
    totals = weights.cumsum(-1, dtype=torch.float64).cpu().numpy()  # numpy searches a row in a fraction of torch's time
    # The first index whose cumulative weight exceeds u * sum, for a u below 1: never a token of weight zero.
    return [
        int(total.searchsorted(total[-1] * min(u, _BELOW_ONE), side="right"))
        for total, u in zip(totals, uniforms, strict=True)
    ]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What a token rejected under q is replaced from: (N, V) weights max(p - q, 0), or p where all of these are 0."""
    rest = (p - q).clamp_min(0.0)
    return torch.where(rest.sum(-1, keepdim=True) > 0.0, rest, p)


def greedy_match(drafts: list[int], targets: list[int]) -> tuple[int, int | None]:
    """(accepted, next token): the longest equal prefix, then the target's token.

    `targets` has one more entry; or as many, and then there is no next token should all drafts be accepted.
    """
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == targets[accepted]:
        accepted += 1
    return accepted, targets[accepted] if accepted < len(targets) else None


def speculative_matches(
    drafts: Sequence[list[int]],
    p: Tensor,
    q: Sequence[list[Tensor]],
    coins: Sequence[list[float]],
    after: Sequence[float],
    bonus: Sequence[bool] | None = None,
) -> list[tuple[int, int | None]]:
    """Speculative sampling (Leviathan et al. 2023) of N rows: of each (accepted, next token), the target's exactly.

    With d_n drafts in row n, `p` is (sum of d_n + 1, V), row after row, `q[n][i]` the (V,) distribution draft i was
    drawn from and `coins[n][i]` a uniform number of its own. A draft x is accepted where its coin is below
    p(x) / q(x); at the first rejection the next token comes from the normalised max(p - q, 0), or from p where that
    residual is zero; when all are accepted it is the bonus token, from p. The uniform number `after[n]` draws it.
    Where `bonus[n]` is false p has no row for the bonus token of row n, and there is none: the next token is None.

    A coin may be known as soon as its draft is drawn, and whether another draft is made may depend on it: this draft is
    verified in any case. What a layer draws may not.
    """
    counts = [len(row) + more for row, more in zip(drafts, bonus or [True] * len(drafts), strict=True)]
    ends = list(accumulate(counts))
    begins = [end - count for end, count in zip(ends, counts, strict=True)]
    places = [begin + i for begin, row in zip(begins, drafts, strict=True) for i in range(len(row))]
    # As p, with zeros in the place of a bonus token: there the residual is p, and it needs no case of its own.
    drawn_from = torch.zeros_like(p)
    if places:
        drawn_from[places] = torch.stack([q_i for row in q for q_i in row])
    padded = [[*row, 0][:count] for row, count in zip(drafts, counts, strict=True)]
    tokens = torch.tensor([token for row in padded for token in row], device=p.device).unsqueeze(1)
    p_x, q_x = torch.stack([p, drawn_from]).gather(-1, tokens.expand(2, -1, 1)).squeeze(-1).tolist()
    accepted, settled = [], []
    for begin, end, row, own in zip(begins, ends, drafts, coins, strict=True):
        at = begin
        while at < begin + len(row) and own[at - begin] * q_x[at] < p_x[at]:
            at += 1
        accepted.append(at - begin)
        settled.append(min(at, end - 1))
    next_tokens = draw_rows(residual(p[settled], drawn_from[settled]), after)
    return [(a, t if a < count else None) for a, t, count in zip(accepted, next_tokens, counts, strict=True)]


def coupled_drafts(p: Tensor, q: Tensor, target: int, u: float) -> tuple[list[int], Tensor]:
    """Drafts at C layers coupled to a target token drawn from (V,) `p`; `q` is (C, V), `u` one uniform for all layers.

    Layer c's draft equals the target with probability min(1, q_c(y) / p(y)), else is drawn from the normalised
    max(q_c - p, 0). Then it has distribution q_c, and it equals the target exactly as often as speculative sampling
    accepts (maximal coupling; design section 5). Returns the drafts and the (C,) acceptance probabilities.
    """
    chance = (q[:, target] / p[target]).clamp_max(1.0)  # (C,)
    accept = chance.tolist()
    # Given rejection, u is uniform on [accept, 1): rescaled, it draws from the residual.
    rescaled = [(u - a) / (1.0 - a) if u >= a else 0.0 for a in accept]
    others = draw_rows(residual(q, p), rescaled)
    return [target if u < a else other for a, other in zip(accept, others, strict=True)], chance
