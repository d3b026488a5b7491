"""The one KV cache that drafting and verification share, and attention over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lede_env.engine.row_attention import Reach, attend_rows


@dataclass(frozen=True)
class Span:
    """The rows and positions one forward covers: R rows, Q consecutive positions each."""

    rows: Tensor | slice  # of the session: (R,), or a slice of them
    positions: Tensor  # (R, Q), or (1, Q) when `whole`
    start: int  # first position, when `whole`
    stop: int  # slots [0, stop) are read
    whole: bool  # one row, or every row of the session at one position: plain slices will do
    mask: Tensor | None  # broadcast to (R, heads, Q, stop): slot <= position, see `KVCache._mask`
    causal: bool = False  # in place of the mask: queries and slots are the same positions
    queries: tuple[list[int], list[int]] | None = None  # in place of the mask: each one's row, and the slots it reads


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
        # Whether rows of different lengths are taken query by query, which pads nothing, or as a padded whole.
        self.by_query = device.type == "cpu" and dtype in (torch.float32, torch.float64)
        self._reach: tuple[tuple, Reach] | None = None  # the last one: the layers of a forward share it

    def span(self, rows: list[int], starts: list[int], width: int) -> Span:
        """Where `width` new positions of each of `rows` go, beginning at `starts`, and what they may read.

        With `by_query` and a width of 1 a row may be listed several times, a position each.
        """
        stop, every, device = max(starts) + width, len(rows) == self.batch, self.slots.device
        if len(rows) == 1 or (every and len(set(starts)) == 1):
            positions = self.slots[starts[0] : stop].unsqueeze(0)  # (1, Q)
            # One query reads everything before it; several need the causal triangle.
            causal = width > 1 and starts[0] == 0 and device.type == "cuda"
            several = width > 1 and not causal
            mask = self._mask(self.slots[:stop] <= positions.squeeze(0).unsqueeze(1)) if several else None
            own = slice(None) if every else slice(rows[0], rows[0] + 1)
            return Span(own, positions, starts[0], stop, True, mask, causal)
        positions = torch.tensor(starts, device=device).unsqueeze(1) + self.slots[:width]  # (R, Q)
        if self.by_query and width == 1:
            return Span(slice(None), positions, 0, stop, False, None, queries=(rows, [start + 1 for start in starts]))
        index = slice(None) if every else torch.tensor(rows, device=device)
        mask = self._mask(self.slots[:stop] <= positions.unsqueeze(-1)).unsqueeze(1)  # (R, 1, Q, stop)
        return Span(index, positions, 0, stop, False, mask)

    def _mask(self, reads: Tensor) -> Tensor:
        """Which slots each query reads, bool, as attention takes it fastest: on a CPU, as what is added to the scores.

        Its kernel would make that of a bool mask itself, in every layer anew: 20 of some 90 us.
        """
        if reads.device.type != "cpu":
            return reads
        return torch.zeros(reads.shape, dtype=self.keys[0].dtype).masked_fill_(~reads, -torch.inf)

    def attend(self, layer: int, span: Span, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store (R, Q, kv_heads, D) keys and values, then attend to all the span may read.

        Queries are (R, Q, heads, D); returns (R Q, heads D). No row's keys and values are copied but, on a GPU, some
        of a batch.
        """
        if span.queries is None:
            attended = self._attend_together(layer, span, queries, keys, values)
        else:
            reach, cache = self._reach_of(span.queries, queries.shape[2]), (self.keys[layer], self.values[layer])
            attended = attend_rows(reach, cache, queries[:, 0], keys[:, 0], values[:, 0])
        return attended.reshape(-1, queries.shape[2] * queries.shape[3])

    def _reach_of(self, queries: tuple[list[int], list[int]], heads: int) -> Reach:
        if self._reach is None or self._reach[0] != queries:
            self._reach = queries, Reach.of(*queries, heads, self.keys[0])
        return self._reach[1]

    def _attend_together(self, layer: int, span: Span, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One call for all rows. Returns (R, Q, heads, D)."""
        cache_k, cache_v, stop = self.keys[layer], self.values[layer], span.stop
        if span.whole:
            cache_k[span.rows, :, span.start : stop] = keys.transpose(1, 2)
            cache_v[span.rows, :, span.start : stop] = values.transpose(1, 2)
        else:
            rows = self.rows[span.rows].unsqueeze(1)  # (R, 1)
            cache_k[rows, :, span.positions] = keys
            cache_v[rows, :, span.positions] = values
        return self.attended(layer, span, queries)

    def attended(self, layer: int, span: Span, queries: Tensor) -> Tensor:
        """(R, Q, heads, D) queries over what is stored of all that the span may read. Returns (R, Q, heads, D)."""
        keys, values = (each[layer][span.rows, :, : span.stop] for each in (self.keys, self.values))
        q, mask = queries.transpose(1, 2), span.mask  # (R, heads, Q, D)
        group = queries.shape[2] // keys.shape[1]
        if mask is not None and group > 1:  # PyTorch's kernels for masks know no groups: their heads become queries
            q = q.reshape(*keys.shape[:2], group * q.shape[2], q.shape[3])
            mask = torch.cat([mask] * group, dim=-2)
        gqa = q.shape[1] != keys.shape[1]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=span.causal, enable_gqa=gqa)
        return out.reshape(queries.transpose(1, 2).shape).transpose(1, 2)
