"""Small numbers between host and device, without a copy between two graphs.

A copy between graphs keeps the device from preparing the next graph while the last one runs: 0.1 ms each on an H200. So
a graph's first kernel fetches what the host has written into the next row of a ring in pinned memory, and its last one
puts the answer into the same row of another, which the host reads once an event says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

RING = 64  # rows in turn: more than there are launches between two waits


@triton.jit
def _fetch_kernel(ring_ptr, turn_ptr, follows_ptr, state_ptr, SIZE, RING: tl.constexpr, BLOCK: tl.constexpr):
    turn = tl.load(turn_ptr)
    place = tl.arange(0, BLOCK)
    values = tl.load(ring_ptr + turn % RING * SIZE + place, mask=place < SIZE, cache_modifier=".cv")
    values = tl.where((place == 0) & (values < 0), tl.load(follows_ptr), values)
    tl.store(state_ptr + place, values, mask=place < SIZE)
    tl.debug_barrier()  # all have read the turn
    tl.store(turn_ptr, turn + 1)


@triton.jit
def _answer_kernel(values_ptr, turn_ptr, ring_ptr, SIZE, RING: tl.constexpr, BLOCK: tl.constexpr):
    turn = tl.load(turn_ptr) - 1  # of the graph that runs
    place = tl.arange(0, BLOCK)
    values = tl.load(values_ptr + place, mask=place < SIZE)
    tl.store(ring_ptr + turn % RING * SIZE + place, values, mask=place < SIZE)


class Mailbox:
    """What the host tells each graph: whole numbers, then floating-point ones. `state` is where kernels find them.

    state: (ints + floats,) int64 on the device; `floats` is the second part of it, (floats,) float64.
    follows: (1,) int64 on the device: what the first number is where the host says -1, for it does not know it yet.
    """

    def __init__(self, ints: int, floats: int, device: torch.device):
        size = ints + floats
        self.ints = ints
        self.state = torch.zeros(size, dtype=torch.long, device=device)
        self.floats = self.state[ints:].view(torch.float64)
        self.follows = torch.zeros(1, dtype=torch.long, device=device)
        self.turn = torch.zeros(1, dtype=torch.long, device=device)  # rows fetched so far
        self._posted = 0  # rows written so far
        self._ring = torch.zeros(RING, size, dtype=torch.long).pin_memory()
        self._whole, self._real = self._ring.numpy(), self._ring.view(torch.float64).numpy()

    def post(self, ints: Sequence[int], floats: Sequence[float]) -> int:
        """Write what the next graph is to fetch; returns the row its answer will be in."""
        row, self._posted = self._posted % RING, self._posted + 1
        self._whole[row, : self.ints] = ints
        self._real[row, self.ints : self.ints + len(floats)] = floats
        return row

    def post_everywhere(self, ints: Sequence[int], floats: Sequence[float]) -> None:
        """As `post` for every graph until the next `post`: to time one over and over."""
        for _ in range(RING):
            self.post(ints, floats)

    def rewind(self) -> None:
        """Host and device begin at the first row again, whatever was posted and not fetched, or fetched twice."""
        self._posted = 0
        self.turn.zero_()

    def fetch(self) -> None:
        """The first kernel of every graph."""
        size = len(self.state)
        rings = (self._ring, self.turn, self.follows, self.state)
        _fetch_kernel[(1,)](*rings, size, RING=RING, BLOCK=triton.next_power_of_2(size), num_warps=1)

    def answers(self, size: int, dtype: torch.dtype) -> Tensor:
        """A ring for answers, (RING, size) in pinned memory."""
        return torch.zeros(RING, size, dtype=dtype).pin_memory()

    def answer(self, values: Tensor, ring: Tensor) -> None:
        """The last kernel of a graph that answers: (size,) values into its row of a ring of `answers`."""
        size = len(values)
        _answer_kernel[(1,)](values, self.turn, ring, size, RING=RING, BLOCK=triton.next_power_of_2(size), num_warps=1)
