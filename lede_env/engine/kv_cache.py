"""The one KV cache that drafting and verification share, and attention over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lede_env.engine.row_attention import attend_rows


class Part(NamedTuple):
    """What one row of a ragged span reads: its slots [0, stop), and which of them each query sees."""

    row: int
    stop: int
    mask: Tensor | None  # (Q, stop) bool; None: all of them


@dataclass(frozen=True)
class Span:
    """The rows and positions one forward covers: R rows, Q consecutive positions each."""

    rows: Tensor | None  # (R,) session rows; None when all of them, in order
    positions: Tensor  # (R, Q), or (1, Q) when `whole`
    start: int  # first position, when `whole`
    stop: int  # slots [0, stop) are read
    whole: bool  # every row of the session at one position: plain slices will do
    mask: Tensor | None  # bool, broadcast to (R, heads, Q, stop): slot <= position
    parts: list[Part] | None = None  # in place of the mask: row by row


class KVCache:
    """Keys and values of every layer, allocated once: a (B, kv_heads, capacity, head_dim) tensor each.

    Heads before slots: what a head reads lies in one piece, which halves the time of attention on a CPU.
    """

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
        shape = (batch, kv_heads, capacity, head_dim)
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
            return Span(None, positions, starts[0], stop, True, self._mask(starts[0], width))
        device = self.slots.device
        positions = torch.tensor(starts, device=device).unsqueeze(1) + self.slots[:width]  # (R, Q)
        every = len(rows) == self.batch  # rows are ascending
        index = None if every else torch.tensor(rows, device=device)
        if device.type == "cpu":  # a call costs less than reading what a longer row makes a shorter one read
            masks = [self._mask(start, width) for start in starts]
            parts = [Part(row, start + width, mask) for row, start, mask in zip(rows, starts, masks, strict=True)]
            return Span(index, positions, 0, stop, False, None, parts)
        mask = (self.slots[:stop] <= positions.unsqueeze(-1)).unsqueeze(1)  # (R, 1, Q, stop)
        return Span(index, positions, 0, stop, False, mask)

    def _mask(self, start: int, width: int) -> Tensor | None:
        """(Q, stop): one query reads everything before it; several need the causal triangle."""
        stop = start + width
        return None if width == 1 else self.slots[:stop] <= self.slots[start:stop].unsqueeze(1)

    def attend(self, layer: int, span: Span, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store (R, Q, kv_heads, D) keys and values, then attend to all the span may read.

        Queries are (R, Q, heads, D); returns (R Q, heads D). No row's keys and values are copied but, on a GPU, some
        of a batch.
        """
        if span.parts is None:
            attended = self._attend_together(layer, span, queries, keys, values)
        elif queries.shape[1] == 1 and queries.dtype in (torch.float32, torch.float64):
            rows, stops, _ = zip(*span.parts, strict=True)
            cache = self.keys[layer], self.values[layer]
            attended = attend_rows(cache, rows, stops, queries[:, 0], keys[:, 0], values[:, 0])
        else:
            attended = self._attend_apart(layer, span.parts, queries, keys, values)
        return attended.reshape(-1, queries.shape[2] * queries.shape[3])

    def _attend_together(self, layer: int, span: Span, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One call for all rows. Returns (R, Q, heads, D)."""
        cache_k, cache_v, stop = self.keys[layer], self.values[layer], span.stop
        if span.whole:
            cache_k[:, :, span.start : stop] = keys.transpose(1, 2)
            cache_v[:, :, span.start : stop] = values.transpose(1, 2)
        else:
            rows = (self.rows if span.rows is None else span.rows).unsqueeze(1)
            cache_k[rows, :, span.positions] = keys
            cache_v[rows, :, span.positions] = values
        read = slice(None) if span.rows is None else span.rows
        return self._scaled_dot_product(queries, cache_k[read, :, :stop], cache_v[read, :, :stop], span.mask)

    def _attend_apart(self, layer: int, parts: list[Part], queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """A call a row. Returns (R, Q, heads, D)."""
        attended = []
        for query, key, value, (row, stop, mask) in zip(queries.split(1), keys, values, parts, strict=True):
            own_k, own_v = self.keys[layer][row : row + 1, :, :stop], self.values[layer][row : row + 1, :, :stop]
            own_k[0, :, stop - len(key) :] = key.transpose(0, 1)
            own_v[0, :, stop - len(value) :] = value.transpose(0, 1)
            attended.append(self._scaled_dot_product(query, own_k, own_v, mask))
        return torch.cat(attended)

    def _scaled_dot_product(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """(R, Q, heads, D) queries over (R, kv_heads, stop, D) keys and values. Returns (R, Q, heads, D)."""
        out = F.scaled_dot_product_attention(
            queries.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=queries.shape[2] != keys.shape[1]
        )
        return out.transpose(1, 2)
