"""Layers over many rows, a prompt's or a batch's: what lies between the products fused, nine launches a layer.

The products are cuBLAS's and attention is PyTorch's. A batch of a few rows, or a short prompt, takes less time than its
launches, so their number is what counts; and of a long prompt, the passes over its states between the products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from lede_env.engine.kv_cache import KVCache, Span
    from lede_env.engine.layered_lm import LayeredLM

BLOCK = 1024  # channels of the MLP a program takes
# Not cuDNN's attention: it plans anew, for 9 ms, at every shape, and with a text its shapes grow.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@triton.jit
def _norm_kernel(x_ptr, weight_ptr, eps_ptr, out_ptr, H, BLOCK: tl.constexpr):
    """RMS norm of one position."""
    h = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * H + h
    x = tl.load(x_ptr + place, mask=h < H, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + h, mask=h < H, other=0.0)
    scaled = (x * tl.rsqrt(tl.sum(x * x, axis=0) / H + tl.load(eps_ptr))).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, scaled * weight, mask=h < H)


@triton.jit
def _place_kernel(
    qkv_ptr, rope_ptr, rows_ptr, positions_ptr, queries_ptr, keys_ptr, values_ptr, capacity, Q, stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BH: tl.constexpr, BKV: tl.constexpr,
):  # fmt: skip
    """Rotate the queries and keys of one position of a row; store its keys and values in the cache."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place // Q)
    position = tl.load(positions_ptr + place // Q * stride + place % Q)
    qkv_ptr += place * (HEADS + 2 * KV_HEADS) * DIM
    kind = queries_ptr.dtype.element_ty
    d, h, kv = tl.arange(0, DIM)[None, :], tl.arange(0, BH)[:, None], tl.arange(0, BKV)[:, None]
    cos = tl.load(rope_ptr + position * DIM + (d & ~1))
    sin = tl.load(rope_ptr + position * DIM + (d | 1)) * tl.where((d & 1) == 0, -1.0, 1.0)
    q = tl.load(qkv_ptr + h * DIM + d, mask=h < HEADS, other=0.0).to(tl.float32)
    pair = tl.load(qkv_ptr + h * DIM + (d ^ 1), mask=h < HEADS, other=0.0).to(tl.float32)
    tl.store(queries_ptr + (place * HEADS + h) * DIM + d, (q * cos + pair * sin).to(kind), mask=h < HEADS)
    there = kv < KV_HEADS
    k = tl.load(qkv_ptr + (HEADS + kv) * DIM + d, mask=there, other=0.0).to(tl.float32)
    pair = tl.load(qkv_ptr + (HEADS + kv) * DIM + (d ^ 1), mask=there, other=0.0).to(tl.float32)
    v = tl.load(qkv_ptr + (HEADS + KV_HEADS + kv) * DIM + d, mask=there, other=0.0)
    slot = ((row * KV_HEADS + kv) * capacity + position) * DIM + d
    tl.store(keys_ptr + slot, (k * cos + pair * sin).to(kind), mask=there)
    tl.store(values_ptr + slot, v, mask=there)


@triton.jit
def _gate_kernel(gate_up_ptr, out_ptr, M, BLOCK: tl.constexpr):
    """silu(gate) * up of one position and block of channels."""
    row, m = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + row * 2 * M + m, mask=m < M, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * M + M + m, mask=m < M, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * M + m, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=m < M)


def run(lm: LayeredLM, x: Tensor, cache: KVCache, span: Span, first: int, last: int) -> Tensor:
    """As `LayeredLM.run`."""
    shape = x.shape
    x = x.reshape(-1, shape[-1]).contiguous()  # (N, H), N = R Q; one slot of each row has gaps, and kernels want none
    rows = cache.rows[span.rows]  # (R,)
    with sdpa_kernel(ATTENTION):
        for index in range(first, last):
            layer, queries = lm.layers[index], _store(lm, x, cache, span, rows, index)
            attended = cache.attended(index, span, queries.view(*shape[:2], *queries.shape[1:]))
            x = torch.addmm(x, attended.reshape(len(x), -1), layer.out)
            x = torch.addmm(x, _gate(_norm(lm, x, layer.mlp_norm) @ layer.gate_up), layer.down)
    return x.view(shape)


def prefill(lm: LayeredLM, cache: KVCache, ids: Tensor) -> None:
    """Keys and values of (n,) tokens, at positions 0 .. n - 1 of the one row of the cache, and nothing else."""
    span, last = cache.span([0], [0], len(ids)), lm.n_layers - 1
    x = run(lm, lm.embed(ids)[None], cache, span, 0, last)
    _store(lm, x[0], cache, span, cache.rows, last)  # nobody reads the states that leave it


def _store(lm: LayeredLM, x: Tensor, cache: KVCache, span: Span, rows: Tensor, index: int) -> Tensor:
    """Put the keys and values of (N, H) states into a layer's cache, at the span's positions of (R,) rows. Returns
    their queries, (N, heads, D)."""
    layer, g, keys = lm.layers[index], lm.geometry, cache.keys[index]
    h = _norm(lm, x, layer.attention_norm)
    qkv = h @ layer.qkv if layer.qkv_bias is None else torch.addmm(layer.qkv_bias, h, layer.qkv)
    queries = torch.empty(len(qkv), g.heads, g.head_dim, dtype=qkv.dtype, device=qkv.device)
    shared, width = len(span.positions) == 1, span.positions.shape[1]
    _place_kernel[(len(qkv),)](
        qkv, torch.view_as_real(lm.rope), rows, span.positions, queries, keys, cache.values[index], keys.shape[2],
        width, 0 if shared else width,
        HEADS=g.heads, KV_HEADS=g.kv_heads, DIM=g.head_dim, BH=triton.next_power_of_2(g.heads),
        BKV=triton.next_power_of_2(g.kv_heads), num_warps=8,
    )  # fmt: skip
    return queries


def _norm(lm: LayeredLM, x: Tensor, weight: Tensor) -> Tensor:
    out, size = torch.empty_like(x), x.shape[-1]
    _norm_kernel[(len(x),)](x, weight, lm.norm_eps, out, size, BLOCK=triton.next_power_of_2(size), num_warps=8)
    return out


def _gate(gate_up: Tensor) -> Tensor:
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    _gate_kernel[(rows, triton.cdiv(size, BLOCK))](gate_up, out, size, BLOCK=BLOCK, num_warps=4)
    return out
