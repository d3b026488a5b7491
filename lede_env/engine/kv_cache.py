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
        cache_k, cache_v, stop = self.keys[layer], self.values[layer], span.stop
        if span.parts is not None and queries.shape[1] == 1 and queries.dtype in (torch.float32, torch.float64):
            own, stops, _ = zip(*span.parts, strict=True)
            return attend_rows((cache_k, cache_v), own, stops, queries[:, 0], keys[:, 0], values[:, 0]).flatten(1)
        if span.whole:
            cache_k[:, :, span.start : stop] = keys.transpose(1, 2)
            cache_v[:, :, span.start : stop] = values.transpose(1, 2)
        else:
            rows = (self.rows if span.rows is None else span.rows).unsqueeze(1)
            cache_k[rows, :, span.positions] = keys
            cache_v[rows, :, span.positions] = values
        queries = queries.transpose(1, 2)  # (R, heads, Q, D)
        grouped = queries.shape[1] != cache_k.shape[1]
        if span.parts is None:
            read = slice(None) if span.rows is None else span.rows
            out = F.scaled_dot_product_attention(
                queries, cache_k[read, :, :stop], cache_v[read, :, :stop], attn_mask=span.mask, enable_gqa=grouped
            )
        else:
            each_k, each_v = cache_k.split(1), cache_v.split(1)  # (1, kv_heads, capacity, D), a row
            out = torch.cat(
                [
                    F.scaled_dot_product_attention(
                        query,
                        each_k[row].narrow(2, 0, end),
                        each_v[row].narrow(2, 0, end),
                        attn_mask=mask,
                        enable_gqa=grouped,
                    )
                    for query, (row, end, mask) in zip(queries.split(1), span.parts, strict=True)
                ]
            )
        return out.transpose(1, 2).flatten(2).flatten(0, 1)
