"""Settling a round of greedy decoding on the device: how many drafts are the most probable tokens, and what follows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # logits a program of the first kernel reads


@triton.jit
def _best_kernel(logits_ptr, tops_ptr, places_ptr, V, BLOCKS, BLOCK: tl.constexpr):
    """The largest of one block of a row of logits, and where: the lowest index among equals."""
    row, block = tl.program_id(0), tl.program_id(1)
    index = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * V + index, mask=index < V, other=float("-inf"))
    top = tl.max(x, axis=0)
    tl.store(tops_ptr + row * BLOCKS + block, top)
    tl.store(places_ptr + row * BLOCKS + block, tl.min(tl.where(x == top, index, 2147483647), axis=0))


@triton.jit
def _match_kernel(
    tops_ptr, places_ptr, tokens_ptr, verdict_ptr, state_ptr, BLOCKS,
    ROWS: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Drafts equal to their targets, up to the first that is not; the target after them, which is pending then."""
    r, p = tl.arange(0, BR), tl.arange(0, BP)
    there = (r < ROWS)[:, None] & (p < BLOCKS)[None, :]
    tops = tl.load(tops_ptr + r[:, None] * BLOCKS + p[None, :], mask=there, other=float("-inf"))  # (BR, BP)
    places = tl.load(places_ptr + r[:, None] * BLOCKS + p[None, :], mask=there, other=2147483647)
    targets = tl.min(tl.where(tops == tl.max(tops, axis=1)[:, None], places, 2147483647), axis=1).to(tl.int64)  # (BR,)
    drafts = tl.load(state_ptr + 4)
    made = r < drafts
    tokens = tl.load(tokens_ptr + 1 + r, mask=made, other=-1)
    accepted = tl.min(tl.where(made & (tokens == targets), BR, r), axis=0)
    following = tl.sum(tl.where(r == accepted, targets, 0), axis=0)
    tl.debug_barrier()  # all drafts are read
    tl.store(tokens_ptr, following)
    tl.store(verdict_ptr, accepted.to(tl.float64))
    tl.store(verdict_ptr + 1, following.to(tl.float64))


class GreedyVerdict:
    """The kernels for one vocabulary and up to `width` rows, with the scratch memory between them."""

    def __init__(self, width: int, vocab: int, device: torch.device):
        self.vocab, self.blocks = vocab, triton.cdiv(vocab, BLOCK)
        self.tops = torch.empty(width, self.blocks, device=device)
        self.places = torch.empty(width, self.blocks, dtype=torch.int32, device=device)

    def __call__(self, logits: Tensor, tokens: Tensor, verdict: Tensor, state: Tensor) -> None:
        """Settle (rows, V) float32 logits, one row more than there can be drafts.

        Args:
            tokens: (.,) int64: the drafts from place 1 on; place 0 becomes the token after those accepted.
            verdict: (.,) float64: the number accepted, then that token.
            state: (.,) int64: state[4] is the number of drafts.
        """
        rows = len(logits)
        _best_kernel[(rows, self.blocks)](
            logits, self.tops, self.places, self.vocab, self.blocks, BLOCK=BLOCK, num_warps=4
        )
        _match_kernel[(1,)](
            self.tops, self.places, tokens, verdict, state, self.blocks,
            ROWS=rows, BR=triton.next_power_of_2(rows), BP=triton.next_power_of_2(self.blocks), num_warps=4,
        )  # fmt: skip
