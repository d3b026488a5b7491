"""Settling a round on the device: how many drafts are accepted, and the token after them.

Greedily a draft is accepted where it is the most probable token. When sampling, draft x is where coin * q(x) < p(x);
what follows the accepted ones is drawn from the residual, max(p - q, 0), or from p where all were; by inverse
transform, as in `lede_env.engine.cuda.readout`, in whose words the same holds of rounding. Where top-k or top-p leaves
tokens out the session does this with tensors instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lede_env.engine.cuda.readout import block_of, token_of

BLOCK = 2048  # logits a program reads
PLAN = 6  # what the draw needs: p's and q's largest logit and sum at the row it is of, that row, whether it has a q


@triton.jit
def _survey_kernel(
    logits_ptr, drafts_ptr, tops_ptr, places_ptr, sums_ptr, masses_ptr, V, BLOCKS, inverse,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DOUBTS: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """Of one block of a row of logits, p's and then q's: the largest, where (the lowest index among equals), the sum of
    exp(l - max), with SAMPLED also that of exp((l - max) / T)."""
    row, block = tl.program_id(0), tl.program_id(1)
    index = block * BLOCK + tl.arange(0, BLOCK)
    if row < ROWS:
        own = logits_ptr + row * V
    else:
        own = drafts_ptr + (row - ROWS) * V
    x = tl.load(own + index, mask=index < V, other=float("-inf"))
    top, cell = tl.max(x, axis=0), row * BLOCKS + block
    tl.store(tops_ptr + cell, top)
    tl.store(places_ptr + cell, tl.min(tl.where(x == top, index, 2147483647), axis=0))
    if DOUBTS:
        tl.store(sums_ptr + cell, tl.sum(tl.exp(x - top), axis=0))
    if SAMPLED:
        tl.store(masses_ptr + cell, tl.sum(tl.exp((x - top) * inverse), axis=0))


@triton.jit
def _joined(tops, parts, inverse):
    """Largest logit of each row, and its sum of exp((l - max) / T), of (BR, BP) blocks' own."""
    top = tl.max(tops, axis=1)
    shift = tl.where(tops > float("-inf"), tops - top[:, None], 0.0)
    return top, tl.sum(tl.where(tops > float("-inf"), parts * tl.exp(shift * inverse), 0.0), axis=1)


@triton.jit
def _settle_kernel(
    logits_ptr, drafts_ptr, tops_ptr, places_ptr, sums_ptr, masses_ptr, plan_ptr, tokens_ptr, uniforms_ptr, verdict_ptr,
    state_ptr, follows_ptr, V, BLOCKS, inverse,
    ROWS: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, DOUBTS: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """Count the accepted drafts. Greedily the token after them too, which is pending then; sampled, plan its draw."""
    r, p = tl.arange(0, BR), tl.arange(0, BP)
    there = (r < ROWS)[:, None] & (p < BLOCKS)[None, :]
    cell = r[:, None] * BLOCKS + p[None, :]
    tops = tl.load(tops_ptr + cell, mask=there, other=float("-inf"))  # (BR, BP)
    drafts = tl.load(state_ptr + 4)
    made = r < drafts
    if DOUBTS:
        _, total = _joined(tops, tl.load(sums_ptr + cell, mask=there, other=0.0), 1.0)
        tl.store(verdict_ptr + 2 + r, tl.log(total).to(tl.float64), mask=r < ROWS)
    if SAMPLED:
        token = tl.load(tokens_ptr + 1 + r, mask=made, other=0)
        top, mass = _joined(tops, tl.load(masses_ptr + cell, mask=there, other=0.0), inverse)
        q_tops = tl.load(tops_ptr + ROWS * BLOCKS + cell, mask=there & made[:, None], other=float("-inf"))
        q_parts = tl.load(masses_ptr + ROWS * BLOCKS + cell, mask=there & made[:, None], other=0.0)
        q_top, q_mass = _joined(q_tops, q_parts, inverse)
        logit = tl.load(logits_ptr + r * V + token, mask=made, other=0.0)
        q_logit = tl.load(drafts_ptr + r * V + token, mask=made, other=0.0)
        p_x = (tl.exp((logit - top) * inverse) / mass).to(tl.float64)
        q_x = (tl.exp((q_logit - q_top) * inverse) / q_mass).to(tl.float64)
        coin = tl.load(uniforms_ptr + r, mask=made, other=1.0)
        accepted = tl.min(tl.where(made & (coin * q_x < p_x), BR, r), axis=0)
        its = r == accepted
        tl.store(plan_ptr, tl.sum(tl.where(its, top, 0.0), axis=0))
        tl.store(plan_ptr + 1, tl.sum(tl.where(its, mass, 0.0), axis=0))
        tl.store(plan_ptr + 2, tl.sum(tl.where(its & made, q_top, 0.0), axis=0))
        tl.store(plan_ptr + 3, tl.sum(tl.where(its & made, q_mass, 0.0), axis=0))
        tl.store(plan_ptr + 4, accepted.to(tl.float32))
        tl.store(plan_ptr + 5, (accepted < drafts).to(tl.float32))
    else:
        places = tl.load(places_ptr + cell, mask=there, other=2147483647)
        targets = tl.min(tl.where(tops == tl.max(tops, axis=1)[:, None], places, 2147483647), axis=1)
        targets = tl.minimum(targets, V - 1).to(tl.int64)  # a token even of NaNs: the next graph looks up its state
        token = tl.load(tokens_ptr + 1 + r, mask=made, other=-1)
        accepted = tl.min(tl.where(made & (token == targets), BR, r), axis=0)
        following = tl.sum(tl.where(r == accepted, targets, 0), axis=0)
        tl.debug_barrier()  # all drafts are read
        tl.store(tokens_ptr, following)
        tl.store(verdict_ptr + 1, following.to(tl.float64))
    tl.store(verdict_ptr, accepted.to(tl.float64))
    tl.store(follows_ptr, tl.load(state_ptr) + accepted + 1)


@triton.jit
def _weights(logits_ptr, drafts_ptr, plan_ptr, index, V, inverse):
    """p, and p's part above q, (BLOCK,) float32, of tokens at the row that the next token is drawn at."""
    row = tl.load(plan_ptr + 4).to(tl.int64)
    x = tl.load(logits_ptr + row * V + index, mask=index < V, other=float("-inf"))
    p = tl.exp((x - tl.load(plan_ptr)) * inverse) / tl.load(plan_ptr + 1)
    has_q = tl.load(plan_ptr + 5) > 0
    x = tl.load(drafts_ptr + row * V + index, mask=(index < V) & has_q, other=float("-inf"))
    q = tl.exp((x - tl.load(plan_ptr + 2)) * inverse) / tl.load(plan_ptr + 3)
    return p, tl.where(has_q, tl.maximum(p - q, 0.0), p)


@triton.jit
def _weigh_kernel(logits_ptr, drafts_ptr, plan_ptr, shares_ptr, V, BLOCKS, inverse, BLOCK: tl.constexpr):
    """Sums of one block's weights, of the residual and of p."""
    block = tl.program_id(0)
    p, rest = _weights(logits_ptr, drafts_ptr, plan_ptr, block * BLOCK + tl.arange(0, BLOCK), V, inverse)
    tl.store(shares_ptr + block, tl.sum(rest.to(tl.float64), axis=0))
    tl.store(shares_ptr + BLOCKS + block, tl.sum(p.to(tl.float64), axis=0))


@triton.jit
def _draw_kernel(
    logits_ptr, drafts_ptr, plan_ptr, shares_ptr, tokens_ptr, uniforms_ptr, verdict_ptr, state_ptr, V, BLOCKS, inverse,
    BP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token after the accepted drafts; from p where nothing is left of the residual."""
    b = tl.arange(0, BP)
    shares = tl.load(shares_ptr + b, mask=b < BLOCKS, other=0.0)
    of_p = tl.load(shares_ptr + BLOCKS + b, mask=b < BLOCKS, other=0.0)
    left = tl.sum(shares, axis=0) > 0
    uniform = tl.load(uniforms_ptr + tl.load(state_ptr + 4))
    block, before, goal = block_of(tl.where(left, shares, of_p), uniform, BLOCKS, BP)
    index = block * BLOCK + tl.arange(0, BLOCK)
    p, rest = _weights(logits_ptr, drafts_ptr, plan_ptr, index, V, inverse)
    token = token_of(tl.where(left, rest, p), index, before, goal, V)
    tl.store(tokens_ptr, token.to(tl.int64))
    tl.store(verdict_ptr + 1, token.to(tl.float64))


class Verdict:
    """The kernels for one vocabulary and up to `width` rows, with the scratch memory between them."""

    def __init__(self, width: int, vocab: int, device: torch.device):
        self.vocab, self.blocks = vocab, triton.cdiv(vocab, BLOCK)
        self.tops, self.sums, self.masses = torch.empty(3, 2 * width, self.blocks, device=device)
        self.places = torch.empty(2 * width, self.blocks, dtype=torch.int32, device=device)
        self.plan = torch.empty(PLAN, device=device)
        self.shares = torch.empty(2, self.blocks, dtype=torch.float64, device=device)

    def __call__(
        self,
        logits: Tensor,
        drafts: Tensor,
        tokens: Tensor,
        uniforms: Tensor,
        verdict: Tensor,
        state: Tensor,
        follows: Tensor,
        temperature: float,
        doubts: bool,
    ) -> None:
        """Settle (rows, V) float32 full-depth logits, one row more than there can be drafts.

        Args:
            drafts: (at least rows, V) float32 logits that the drafts were drawn from; read only when sampling.
            tokens: (.,) int64: the drafts from place 1 on; place 0 becomes the token after those accepted.
            uniforms: (.,) float64: the coin of each draft, then the number that draws what follows.
            verdict: (2 + rows,) float64: the number accepted, then that token; then, with `doubts`, -log p_max of rows.
            state: (.,) int64: state[0] is the round's first position, state[4] the number of drafts.
            follows: (1,) int64, becomes the first position of the next round.
        """
        rows, size, blocks = len(logits), self.vocab, self.blocks
        sampled, inverse = temperature > 0, 1.0 / temperature if temperature else 1.0
        found = (self.tops, self.places, self.sums, self.masses)
        kind = dict(DOUBTS=doubts, SAMPLED=sampled)
        _survey_kernel[(2 * rows if sampled else rows, blocks)](
            logits, drafts, *found, size, blocks, inverse, ROWS=rows, BLOCK=BLOCK, num_warps=4, **kind
        )
        bp = triton.next_power_of_2(blocks)
        _settle_kernel[(1,)](
            logits, drafts, *found, self.plan, tokens, uniforms, verdict, state, follows, size, blocks, inverse,
            ROWS=rows, BR=triton.next_power_of_2(rows), BP=bp, num_warps=4, **kind,
        )  # fmt: skip
        if sampled:
            _weigh_kernel[(blocks,)](logits, drafts, self.plan, self.shares, size, blocks, inverse, BLOCK=BLOCK)
            _draw_kernel[(1,)](
                logits, drafts, self.plan, self.shares, tokens, uniforms, verdict, state, size, blocks, inverse,
                BP=bp, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
