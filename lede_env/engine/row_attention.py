"""Attention of one position of each of several rows, every row with a length of its own, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def attend_rows(
    cache: tuple[Tensor, Tensor],
    rows: Sequence[int],
    stops: Sequence[int],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Store each row's key and value in slot `stop - 1` of its cache, then attend to its slots [0, stop).

    The work is reading the cache, once and no further than each row goes. Two products of a vector and a matrix a row
    do just that; fused attention is made for many queries, and shares out among threads what is too little to share.

    Args:
        cache: (B, kv_heads, capacity, D) keys and values, float32 or float64.
        rows, stops: R of each.
        queries: (R, heads, D); keys and values: (R, kv_heads, D).

    Returns:
        (R, heads, D).
    """
    cache_k, cache_v = (each.numpy() for each in cache)
    n, heads, dim = queries.shape
    kv_heads = cache_k.shape[1]
    cache_k[rows, :, [stop - 1 for stop in stops]] = keys.numpy()
    cache_v[rows, :, [stop - 1 for stop in stops]] = values.numpy()
    grouped = (queries * dim**-0.5).view(n, kv_heads, heads // kv_heads, dim).numpy()
    ends = np.cumsum(stops, dtype=np.int64)
    begins = ends - np.array(stops)
    pieces = [slice(begin, end) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
    weights = np.empty((*grouped.shape[1:3], ends[-1]), grouped.dtype)  # (kv_heads, heads / kv_heads, sum of stops)
    for query, row, stop, piece in zip(grouped, rows, stops, pieces, strict=True):
        np.matmul(query, cache_k[row, :, :stop].swapaxes(1, 2), out=weights[..., piece])
    weights -= np.maximum.reduceat(weights, begins, axis=-1).repeat(stops, axis=-1)
    np.exp(weights, out=weights)
    out = np.empty_like(grouped)
    for own, row, stop, piece in zip(out, rows, stops, pieces, strict=True):
        np.matmul(weights[..., piece], cache_v[row, :, :stop], out=own)
    out /= np.moveaxis(np.add.reduceat(weights, begins, axis=-1), -1, 0)[..., None]
    return torch.from_numpy(out).view(n, heads, dim)
