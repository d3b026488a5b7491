"""A decoding session: the KV cache of a batch, and the open round of each row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lede_env.engine.kv_cache import KVCache, Span
from lede_env.errors import LedeError

if TYPE_CHECKING:
    from lede_env.engine.layered_lm import LayeredLM


TAPPED_PROMPT = 32  # prompt positions whose states are kept for strategies that learn from them


class Session:
    """Mutable state of `batch` sequences on one LayeredLM.

    Between rounds, `lengths[row]` positions of a row have keys and values in every layer. A round opens slots
    after them: slot i holds the round's i-th token (slot 0 the pending one), its state `hidden[row, i]` and
    `depth[row][i]`, the layers it has been through. Depths never rise along a row, because a slot cannot pass a
    layer before the slots in front of it: those that wait below ride along (design section 4). Lists of rows are
    ascending.

    Use it as a context manager: a session in use refuses a second user, and leaves by any exception usable.
    """

    SLACK = 1  # rounds of slots, and positions after the last valid one, that padding may write

    def __init__(self, lm: LayeredLM, batch: int, capacity: int, width: int, taps: Sequence[int] = ()):
        if batch < 1:
            raise LedeError(f"a session needs at least one row, got batch={batch}")
        if not 1 <= capacity <= lm.geometry.context:
            raise LedeError(
                f"session capacity {capacity} is out of range: {lm.name}'s context is {lm.geometry.context} tokens"
            )
        geometry = lm.geometry
        self.lm, self.batch, self.capacity, self.width = lm, batch, capacity, width
        # Rows of a batch are padded to the longest open round, so writes may pass the last valid position.
        self.cache = KVCache(
            geometry.n_layers,
            batch,
            geometry.kv_heads,
            capacity + self.SLACK * width,
            geometry.head_dim,
            lm.dtype,
            lm.device,
        )
        self.hidden = torch.zeros(batch, self.SLACK * width, geometry.hidden, dtype=lm.dtype, device=lm.device)
        self.tapped = {layer: torch.zeros_like(self.hidden) for layer in taps}  # states of the slots leaving a layer
        self.lengths = [0] * batch
        self.depth: list[list[int]] = [[] for _ in range(batch)]
        self._busy = False

    def __enter__(self) -> Session:
        if self._busy:
            raise LedeError("this session is in use; open another with lm.session(...)")
        self._busy = True
        return self

    def __exit__(self, *exc: object) -> None:
        self._busy = False
        for slots in self.depth:
            slots.clear()

    def prefill(self, row: int, ids: list[int]) -> Tensor:
        """Forget the row, then run every layer over `ids` (the prompt without its last token; may be empty).

        Returns the (taps, n, H) states of the last n <= TAPPED_PROMPT positions leaving each tapped layer.
        """
        self._forget(row, len(ids))
        seen = self.hidden.new_zeros(len(self.tapped), 0, self.hidden.shape[-1])
        for begin in range(0, len(ids), 512):
            part = ids[begin : begin + 512]
            span = self.cache.span([row], [begin], len(part))
            x = self.lm.embed(torch.tensor(part, device=self.lm.device)).unsqueeze(0)
            seen = torch.cat([seen, self._run_all(x, span)], dim=1)[:, -TAPPED_PROMPT:]
        self.lengths[row] = len(ids)
        return seen

    def kept(self, row: int) -> Tensor:
        """(2 layers, kv_heads, n, D) copy of the keys, then the values, of the row's n positions."""
        return torch.stack([each[row, :, : self.lengths[row]] for each in (*self.cache.keys, *self.cache.values)])

    def restore(self, row: int, kept: Tensor) -> None:
        """Forget the row, then have it hold what `kept` once returned of another."""
        self._forget(row, kept.shape[2])
        self.lengths[row] = kept.shape[2]
        for each, own in zip((*self.cache.keys, *self.cache.values), kept, strict=True):
            each[row, :, : self.lengths[row]] = own

    def _forget(self, row: int, length: int) -> None:
        """Make way for a prompt of that length."""
        self.lengths[row] = 0
        self.depth[row].clear()
        if length > self.capacity:
            raise LedeError(f"{length} prompt tokens do not fit the session's {self.capacity} positions")

    def _run_all(self, x: Tensor, span: Span) -> Tensor:
        """Run (1, Q, H) states through every layer; returns the (taps, Q, H) states leaving the tapped ones."""
        seen = x.new_zeros(len(self.tapped), *x.shape[1:])
        for first, last in pairwise(sorted({0, *self.tapped, self.lm.n_layers})):
            x = self.lm.run(x, self.cache, span, first, last)
            if last in self.tapped:
                seen[list(self.tapped).index(last)] = x[0]
        return seen

    def feed(self, rows: list[int], tokens: list[int]) -> None:
        """Open the next slot of each row with its token, at depth 0."""
        states = self.lm.embed(torch.tensor(tokens, device=self.lm.device))  # (R, H)
        if len(rows) == 1:  # a view, where an index would be turned into tensors
            self.hidden[rows[0], len(self.depth[rows[0]])] = states[0]
        else:
            self.hidden[rows, [len(self.depth[row]) for row in rows]] = states
        for row in rows:
            self.depth[row].append(0)

    def advance(self, rows: list[int], targets: list[int]) -> None:
        """Run the newest slot of each row on to its target layer; slots waiting on the way ride along."""
        goal = dict(zip(rows, targets, strict=True))
        stops = {depth for row in rows for depth in self.depth[row] if depth < goal[row]} | {*targets, *self.tapped}
        for first, last in pairwise(sorted(stops)):
            moving = [row for row in rows if self.depth[row][-1] == first and goal[row] >= last]
            if moving:
                self._move(moving, first, last)

    def _move(self, rows: list[int], first: int, last: int) -> None:
        """Run every slot at depth `first` of these rows through layers first+1..last."""
        tails = [self.depth[row].index(first) for row in rows]  # the first slot that moves
        counts = [len(self.depth[row]) - tail for row, tail in zip(rows, tails, strict=True)]
        if self.cache.by_query and len(rows) > 1:
            self._move_by_query(rows, tails, counts, first, last)
        else:
            self._move_padded(rows, tails, counts, first, last)
        for row, tail in zip(rows, tails, strict=True):
            self.depth[row][tail:] = [last] * (len(self.depth[row]) - tail)
            if last in self.tapped:
                self.tapped[last][row, tail : len(self.depth[row])] = self.hidden[row, tail : len(self.depth[row])]

    def _move_by_query(self, rows: list[int], tails: list[int], counts: list[int], first: int, last: int) -> None:
        """As `_move`, slot by slot."""
        moving = [(row, tail + i) for row, tail, count in zip(rows, tails, counts, strict=True) for i in range(count)]
        who, slots = map(list, zip(*moving, strict=True))
        span = self.cache.span(who, [self.lengths[row] + slot for row, slot in moving], 1)
        index = torch.tensor(who), torch.tensor(slots)
        self.hidden[index] = self.lm.run(self.hidden[index].unsqueeze(1), self.cache, span, first, last).squeeze(1)

    def _move_padded(self, rows: list[int], tails: list[int], counts: list[int], first: int, last: int) -> None:
        """As `_move`, all rows padded at the end to one width."""
        width = max(counts)
        starts = [self.lengths[row] + tail for row, tail in zip(rows, tails, strict=True)]
        span = self.cache.span(rows, starts, width)
        if len(set(tails)) == 1:
            window = (slice(None) if len(rows) == self.batch else rows, slice(tails[0], tails[0] + width))
            self.hidden[window] = self.lm.run(self.hidden[window], self.cache, span, first, last)
            return
        device = self.lm.device
        index = torch.tensor(rows, device=device).unsqueeze(1)  # (R, 1)
        offsets = torch.arange(width, device=device)
        slots = torch.tensor(tails, device=device).unsqueeze(1) + offsets  # (R, Q)
        real = offsets < torch.tensor(counts, device=device).unsqueeze(1)  # (R, Q)
        slots = torch.where(real, slots, slots[:, :1])  # padding repeats a real state; its keys are overwritten
        out = self.lm.run(self.hidden[index, slots], self.cache, span, first, last)
        self.hidden[index.expand_as(slots)[real], slots[real]] = out[real]

    def newest(self, rows: list[int]) -> Tensor:
        """(R, H) state of each row's newest slot."""
        if self.batch == 1:
            return self.hidden[0, len(self.depth[0]) - 1].unsqueeze(0)
        slots = [len(self.depth[row]) - 1 for row in rows]
        return self.hidden[rows, slots]

    def finish(self, rows: list[int]) -> list[Tensor]:
        """Verification: every open slot to full depth. Returns (slots, H) states of each row."""
        self.advance(rows, [self.lm.n_layers] * len(rows))
        return [self.hidden[row, : len(self.depth[row])] for row in rows]

    def tapped_states(self, row: int, slots: int) -> Tensor:
        """(taps, slots, H) states of a row's first slots leaving each tapped layer."""
        return torch.stack([states[row, :slots] for states in self.tapped.values()])

    def close_round(self, row: int, kept: int) -> None:
        """Keep the first `kept` slots' keys and values (the pending token and the accepted drafts); drop the rest."""
        self.lengths[row] += kept
        self.depth[row].clear()
