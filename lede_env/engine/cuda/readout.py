"""What a decision and a draft need of a next-token distribution: read off the logits in two small kernels.

A sampled draft is drawn there too, by inverse transform, where neither top-k nor top-p leaves tokens out: block by
block the first kernel sums exp((l - max) / T), the second finds the block that the uniform number falls into, and in it
the token. That is the token of `lede_env.engine.acceptance.draw_rows`, but where the number lies within rounding of
the border between two tokens: weights here and softmax's there are float32 and differ by about 1e-6 of themselves, sums
are float64 in both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lede_env.engine.read_signals import TOP

BLOCK = 1024  # logits a program of the first kernel reads


@triton.jit
def _largest(x, index, values_ptr, places_ptr, COUNT: tl.constexpr):
    """The COUNT largest of x, descending, the lowest index first among equals."""
    for i in tl.range(0, COUNT):
        top = tl.max(x, axis=0)
        place = tl.min(tl.where(x == top, index, 2147483647), axis=0)
        tl.store(values_ptr + i, top)
        tl.store(places_ptr + i, place)
        x = tl.where(index == place, float("-inf"), x)


@triton.jit
def block_of(masses, uniform, BLOCKS, BP: tl.constexpr):
    """The block that `uniform` times the whole falls into, of the sums (BP,) of blocks; the sum before it; the goal."""
    p = tl.arange(0, BP)
    reached = tl.cumsum(masses, axis=0)
    goal = uniform * tl.max(reached, axis=0)
    # Sums of a parallel scan need not ascend where nothing is added: only what weighs something counts, and should
    # rounding let none of it pass the goal, the last of it will do.
    block = tl.min(tl.where((masses > 0) & (reached > goal), p, BLOCKS), axis=0)
    block = tl.minimum(block, tl.max(tl.where(masses > 0, p, 0), axis=0))
    return block, tl.max(tl.where(p < block, reached, 0.0), axis=0), goal


@triton.jit
def token_of(weight, index, before, goal, V):
    """The first token of a block at which the running sum of weights, from `before` on, exceeds the goal."""
    within = before + tl.cumsum(weight.to(tl.float64), axis=0)
    token = tl.min(tl.where((weight > 0) & (within > goal), index, V), axis=0)
    return tl.minimum(token, tl.max(tl.where(weight > 0, index, 0), axis=0))


@triton.jit
def _blocks_kernel(
    logits_ptr, parts_ptr, values_ptr, places_ptr, masses_ptr, state_ptr, V, inverse,
    BLOCK: tl.constexpr, COUNT: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """Of one block of logits: its maximum, sum of exp(l - max), sum of exp(l - max) (l - max), and COUNT largest; with
    SAMPLED also the sum of exp((l - max) / T)."""
    block = tl.program_id(0)
    logits_ptr += tl.load(state_ptr + 1) * V
    index = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + index, mask=index < V, other=float("-inf"))
    top = tl.max(x, axis=0)
    below = tl.where(x == float("-inf"), float("-inf"), x - top)  # a number too where the whole block is -inf
    weight = tl.exp(below)
    tl.store(parts_ptr + block * 3, top)
    tl.store(parts_ptr + block * 3 + 1, tl.sum(weight, axis=0))
    tl.store(parts_ptr + block * 3 + 2, tl.sum(tl.where(weight > 0, weight * below, 0.0), axis=0))
    if SAMPLED:
        tl.store(masses_ptr + block, tl.sum(tl.exp(below * inverse).to(tl.float64), axis=0))
    _largest(x, index, values_ptr + block * COUNT, places_ptr + block * COUNT, COUNT)


@triton.jit
def _join_kernel(
    logits_ptr, parts_ptr, values_ptr, places_ptr, masses_ptr, uniform_ptr, out_ptr, tokens_ptr, state_ptr, V, BLOCKS,
    inverse,
    BLOCK: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, COUNT: tl.constexpr, DRAW: tl.constexpr,
    SAMPLED: tl.constexpr,
):  # fmt: skip
    """Join the blocks. With DRAW the most probable token becomes the draft, with SAMPLED too a drawn one."""
    logits_ptr += tl.load(state_ptr + 1) * V
    p = tl.arange(0, BP)
    tops = tl.load(parts_ptr + p * 3, mask=p < BLOCKS, other=float("-inf"))
    sums = tl.load(parts_ptr + p * 3 + 1, mask=p < BLOCKS, other=0.0)
    moments = tl.load(parts_ptr + p * 3 + 2, mask=p < BLOCKS, other=0.0)
    top = tl.max(tops, axis=0)
    shift = tl.where(tops == float("-inf"), 0.0, tops - top)
    weight = tl.where(tops == float("-inf"), 0.0, tl.exp(shift))
    total = tl.sum(sums * weight, axis=0)
    mean = tl.sum((moments + sums * shift) * weight, axis=0) / total  # of l - max
    guess = tl.load(state_ptr + 2)
    c = tl.arange(0, BC)
    values = tl.load(values_ptr + c, mask=c < BLOCKS * COUNT, other=float("-inf"))
    places = tl.load(places_ptr + c, mask=c < BLOCKS * COUNT, other=2147483647)
    token = tl.minimum(tl.min(tl.where(values == top, places, 2147483647), axis=0), V - 1)  # a token even of NaNs
    for i in tl.range(0, COUNT):
        best = tl.max(values, axis=0)
        place = tl.min(tl.where(values == best, places, 2147483647), axis=0)
        tl.store(out_ptr + i, best)
        tl.store(out_ptr + COUNT + i, place.to(tl.float32))
        values = tl.where(places == place, float("-inf"), values)
    tl.store(out_ptr + 2 * COUNT, top + tl.log(total))
    tl.store(out_ptr + 2 * COUNT + 1, tl.log(total) - mean)
    tl.store(out_ptr + 2 * COUNT + 2, tl.load(logits_ptr + tl.maximum(guess, 0)))
    if SAMPLED:
        masses = tl.load(masses_ptr + p, mask=p < BLOCKS, other=0.0) * tl.exp(shift * inverse).to(tl.float64)
        block, before, goal = block_of(masses, tl.load(uniform_ptr), BLOCKS, BP)
        index = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + index, mask=index < V, other=float("-inf"))
        token = token_of(tl.exp((x - top) * inverse), index, before, goal, V)
    if DRAW:
        tl.store(out_ptr + 2 * COUNT + 3, token.to(tl.float32))
        tl.store(out_ptr + 2 * COUNT + 4, tl.load(logits_ptr + token))
        tl.store(tokens_ptr + tl.load(state_ptr + 1) + 1, token.to(tl.int64))


class ReadOut:
    """The kernels for one vocabulary, with the scratch memory between them."""

    def __init__(self, vocab: int, device: torch.device):
        self.vocab, self.blocks = vocab, triton.cdiv(vocab, BLOCK)
        self.parts = torch.empty(self.blocks, 3, device=device)
        self.values = torch.empty(self.blocks, TOP, device=device)
        self.places = torch.empty(self.blocks, TOP, dtype=torch.int32, device=device)
        self.masses = torch.empty(self.blocks, dtype=torch.float64, device=device)

    def __call__(
        self, logits: Tensor, out: Tensor, tokens: Tensor, state: Tensor, uniform: Tensor, temperature: float | None
    ) -> None:
        """Read the open slot's row of (., V) float32 logits into `out`, (SIZE,) float32, and draw its draft.

        Args:
            tokens: (.,) int64; the draft is written after the open slot.
            state: (.,) int64: state[1] is the open slot, state[2] the lookup's guess, -1 for none.
            uniform: (.,) float64, whose first number draws the draft.
            temperature: 0 takes the most probable token, None makes no draft.
        """
        sampled = bool(temperature)
        inverse = 1.0 / temperature if temperature else 1.0
        scratch = (self.parts, self.values, self.places, self.masses)
        _blocks_kernel[(self.blocks,)](
            logits, *scratch, state, self.vocab, inverse, BLOCK=BLOCK, COUNT=TOP, SAMPLED=sampled, num_warps=4
        )
        _join_kernel[(1,)](
            logits, *scratch, uniform, out, tokens, state, self.vocab, self.blocks, inverse,
            BLOCK=BLOCK, BP=triton.next_power_of_2(self.blocks), BC=triton.next_power_of_2(self.blocks * TOP),
            COUNT=TOP, DRAW=temperature is not None, SAMPLED=sampled, num_warps=4,
        )  # fmt: skip
