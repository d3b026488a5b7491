"""The one KV cache that drafting and verification share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The rows and positions one forward covers: R rows, Q consecutive positions each.

    `whole` marks the fast case, every row of the session at the same position: slices, no gather.
    """

    rows: Tensor | None  # (R,) session rows, None when all of them
    positions: Tensor  # (R, Q), or (1, Q) when `whole`
    start: int  # first position, when `whole`
    stop: int  # slots [0, stop) are read
    whole: bool
    mask: Tensor | None  # bool, broadcast to (R, heads, Q, stop): slot <= position


class KVCache:
    """Keys and values of every layer, allocated once: a (B, capacity, kv_heads, head_dim) tensor each."""

    def __init__(
        self,
        n_layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device,
    ):
        shape = (batch, capacity, kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.batch, self.capacity = batch, capacity
        self.slots = torch.arange(capacity, device=device)
        self.rows = torch.arange(batch, device=device)

    def span(self, rows: list[int], starts: list[int], width: int) -> Span:
        """Where `width` new positions of each of `rows` go, beginning at `starts`, and what they may read."""
        stop = max(starts) + width
        whole = len(rows) == self.batch and len(set(starts)) == 1
        if whole:
            positions = self.slots[starts[0] : stop].unsqueeze(0)  # (1, Q)
            # One query reads everything before it; several need the causal triangle.
            mask = None if width == 1 else (self.slots[:stop] <= positions[0].unsqueeze(1))
            return Span(None, positions, starts[0], stop, True, mask)
        device = self.slots.device
        positions = torch.tensor(starts, device=device).unsqueeze(1) + self.slots[:width]  # (R, Q)
        mask = (self.slots[:stop] <= positions.unsqueeze(-1)).unsqueeze(1)  # (R, 1, Q, stop)
        every = len(rows) == self.batch and rows == list(range(self.batch))
        index = None if every else torch.tensor(rows, device=device)
        return Span(index, positions, 0, stop, False, mask)

    def write(self, layer: int, span: Span, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (R, Q, kv_heads, D) keys and values; return all that the span may read, (R, kv_heads, stop, D)."""
        cache_k, cache_v = self.keys[layer], self.values[layer]
        if span.whole:
            cache_k[:, span.start : span.stop] = keys
            cache_v[:, span.start : span.stop] = values
            return cache_k[:, : span.stop].transpose(1, 2), cache_v[:, : span.stop].transpose(1, 2)
        rows = self.rows if span.rows is None else span.rows
        cache_k[rows.unsqueeze(1), span.positions] = keys
        cache_v[rows.unsqueeze(1), span.positions] = values
        if span.rows is None:
            return cache_k[:, : span.stop].transpose(1, 2), cache_v[:, : span.stop].transpose(1, 2)
        return cache_k[rows, : span.stop].transpose(1, 2), cache_v[rows, : span.stop].transpose(1, 2)
