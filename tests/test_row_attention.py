"""Queries of several rows against torch's attention, one by one."""

import pytest
import torch
import torch.nn.functional as F

from lede_env.engine.row_attention import Reach, attend_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_rows_attend_as_torch_does(kv_heads, dtype):
    torch.manual_seed(0)
    rows, stops, heads, dim = [0, 2, 2, 3], [1, 39, 40, 17], 6, 8
    cache = tuple(torch.randn(4, kv_heads, 40, dim, dtype=dtype) for _ in range(2))
    before = [each.clone() for each in cache]
    queries = 3 * torch.randn(4, heads, dim, dtype=dtype)
    keys, values = (torch.randn(4, kv_heads, dim, dtype=dtype) for _ in range(2))
    reach = Reach.of(rows, stops, heads, cache[0])
    attend_rows(reach, cache, queries.flip(0), keys, values)  # a layer before
    out = attend_rows(reach, cache, queries, keys, values)
    for place, (row, stop) in enumerate(zip(rows, stops, strict=True)):
        for each, was, new in zip(cache, before, (keys, values), strict=True):
            was[row, :, stop - 1] = new[place]
            assert torch.equal(each[row, :, :stop], was[row, :, :stop])
        read = [each[row : row + 1, :, :stop] for each in cache]
        expected = F.scaled_dot_product_attention(queries[place][None, :, None], *read, enable_gqa=True)
        torch.testing.assert_close(out[place], expected[0, :, 0])
    assert all(torch.equal(each[1], was[1]) for each, was in zip(cache, before, strict=True))  # nobody's row
