"""Attention over the KV cache, against one query and one head at a time."""

import pytest
import torch

from lede_env.engine.kv_cache import KVCache

HEADS, DIM, CAPACITY = 6, 8, 24


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(
    ("rows", "starts", "width"),
    [([0, 1, 2], [3, 9, 5], 4), ([0, 2], [3, 9], 1), ([0, 1, 2], [7, 7, 7], 3), ([1], [0], 5), ([1], [6], 1)],
)
def test_a_span_reads_its_own_rows_up_to_its_own_positions(rows, starts, width, kv_heads):
    torch.manual_seed(0)
    cache = KVCache(1, 3, kv_heads, CAPACITY, DIM, torch.float64, torch.device("cpu"))
    cache.by_query = False  # as on a GPU
    for stored in (cache.keys[0], cache.values[0]):
        stored.normal_()
    queries = torch.randn(len(rows), width, HEADS, DIM, dtype=torch.float64)
    keys, values = (torch.randn(len(rows), width, kv_heads, DIM, dtype=torch.float64) for _ in range(2))
    out = cache.attend(0, cache.span(rows, starts, width), queries, keys, values).view(queries.shape)
    for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
        for q in range(width):
            stop = start + q + 1
            for head in range(HEADS):
                kv = head // (HEADS // kv_heads)
                own_keys, own_values = (each[0][row, kv, :stop] for each in (cache.keys, cache.values))
                weights = (own_keys @ queries[place, q, head] / DIM**0.5).softmax(0)
                torch.testing.assert_close(out[place, q, head], weights @ own_values)
        torch.testing.assert_close(cache.keys[0][row, :, start : start + width], keys[place].transpose(0, 1))
