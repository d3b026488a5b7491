"""The one KV cache that drafting and verification share, and attention over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The rows and positions one forward covers: R rows, Q consecutive positions each."""

    rows: Tensor | None  # (R,) session rows; None when all of them, in order
    positions: Tensor  # (R, Q), or (1, Q) when `whole`
    start: int  # first position, when `whole`
    stop: int  # slots [0, stop) are read
    whole: bool  # every row of the session at one position: plain slices will do
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
        device: torch.device,
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
        if len(rows) == self.batch and len(set(starts)) == 1:
            positions = self.slots[starts[0] : stop].unsqueeze(0)  # (1, Q)
            # One query reads everything before it; several need the causal triangle.
            mask = None if width == 1 else self.slots[:stop] <= positions[0].unsqueeze(1)
            return Span(None, positions, starts[0], stop, True, mask)
        device = self.slots.device
        positions = torch.tensor(starts, device=device).unsqueeze(1) + self.slots[:width]  # (R, Q)
        mask = (self.slots[:stop] <= positions.unsqueeze(-1)).unsqueeze(1)  # (R, 1, Q, stop)
        every = len(rows) == self.batch  # rows are ascending
        return Span(None if every else torch.tensor(rows, device=device), positions, 0, stop, False, mask)

    def attend(self, layer: int, span: Span, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store (R, Q, kv_heads, D) keys and values, then attend to all the span may read.

        Queries are (R, Q, heads, D); returns (R Q, heads D). Some of the rows are gathered, whole batches are not.
        """
        cache_k, cache_v, stop = self.keys[layer], self.values[layer], span.stop
        if span.whole:
            cache_k[:, span.start : stop] = keys
            cache_v[:, span.start : stop] = values
        else:
            rows = self.rows if span.rows is None else span.rows
            cache_k[rows.unsqueeze(1), span.positions] = keys
            cache_v[rows.unsqueeze(1), span.positions] = values
        read = slice(None) if span.rows is None else span.rows
        keys, values = cache_k[read, :stop].transpose(1, 2), cache_v[read, :stop].transpose(1, 2)
        grouped = queries.shape[2] != keys.shape[1]
        out = F.scaled_dot_product_attention(
            queries.transpose(1, 2), keys, values, attn_mask=span.mask, enable_gqa=grouped
        )
        return out.transpose(1, 2).flatten(2).flatten(0, 1)
