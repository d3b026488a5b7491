"""Attention of many queries, each over a text of its own, on a CPU: rows of a batch differ in length and in slots.

Which slots a query reads is a sparse matrix, and attention over them two sparse products: scores only where the matrix
has entries, then weighted sums of the values there. Both read the cache once, no further than each query goes, and
share out the queries among threads. Nothing is padded.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Reach:
    """What N queries of a (B, kv_heads, capacity, D) cache read: query n the slots [0, stop) of its row.

    Entries are ordered by query, head and slot.
    """

    rows: np.ndarray  # (N,) of the batch
    slots: np.ndarray  # (N,) where the query's own key and value go: stop - 1
    pattern: Tensor  # (N heads, B kv_heads capacity) CSR with an entry for each slot read, which holds its weight
    counts: np.ndarray  # (N heads,) entries of each

    @classmethod
    def of(cls, rows: Sequence[int], stops: Sequence[int], heads: int, cache: Tensor) -> Reach:
        """N of `rows` and `stops`; a row may have several queries. The pattern has the cache's dtype."""
        batch, kv_heads, capacity, _ = cache.shape
        counts = np.repeat(stops, heads)
        ends = np.cumsum(counts)
        first = (np.array(rows)[:, None] * kv_heads + np.arange(heads) // (heads // kv_heads)) * capacity  # (N, heads)
        places = np.arange(ends[-1]) + np.repeat(first.ravel() - ends + counts, counts)
        begins = np.concatenate([[0], ends])
        with warnings.catch_warnings():  # torch announces that its sparse CSR tensors are a beta feature
            warnings.simplefilter("ignore", UserWarning)
            pattern = torch.sparse_csr_tensor(
                torch.from_numpy(begins.astype(np.int32)),
                torch.from_numpy(places.astype(np.int32)),
                torch.zeros(len(places), dtype=cache.dtype),
                (len(counts), batch * kv_heads * capacity),
            )
        return cls(np.array(rows), np.array(stops) - 1, pattern, counts)


def attend_rows(reach: Reach, cache: tuple[Tensor, Tensor], queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Store every query's own key and value in the cache, then attend to all that each reads.

    Args:
        reach: of this cache and these queries; its weights are overwritten.
        cache: (B, kv_heads, capacity, D) keys and values, contiguous, float32 or float64.
        queries: (N, heads, D); keys and values: (N, kv_heads, D).

    Returns:
        (N, heads, D).
    """
    for each, new in zip(cache, (keys, values), strict=True):
        each.numpy()[reach.rows, :, reach.slots] = new.numpy()  # half of torch's time
    dim = queries.shape[-1]
    cache_k, cache_v = (each.view(-1, dim) for each in cache)  # (B kv_heads capacity, D)
    pattern, flat = reach.pattern, queries.reshape(-1, dim)
    torch.sparse.sampled_addmm(pattern, flat, cache_k.t(), beta=0.0, alpha=dim**-0.5, out=pattern)
    begins, weights = pattern.crow_indices()[:-1], pattern.values()
    numbers, starts = weights.numpy(), begins.numpy()
    numbers -= np.maximum.reduceat(numbers, starts).repeat(reach.counts)
    np.exp(numbers, out=numbers)
    totals = torch.from_numpy(np.add.reduceat(numbers, starts)).unsqueeze(1)  # (N heads, 1)
    summed = F.embedding_bag(pattern.col_indices(), cache_v, begins, mode="sum", per_sample_weights=weights)
    return summed.div_(totals).view(queries.shape)
