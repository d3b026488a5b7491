"""A prompt through every layer at once: keys and values into the cache, and nothing else kept.

The products are cuBLAS's and attention is PyTorch's fused kernel; what lies between them is fused here, so that a layer
is nine launches. Short prompts take less time than their launches, so those run as captured graphs, padded at the end
to one of a few lengths: no position sees a later one, and what padding leaves in the cache is overwritten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from lede_env.engine.kv_cache import KVCache
    from lede_env.engine.layered_lm import LayeredLM

CAPTURED = 512  # positions up to which a prompt runs as a graph
LONGEST = 4096  # positions up to which a prompt runs in one piece, for the memory it takes
BLOCK = 1024  # channels of the MLP a program takes


def padded(length: int) -> int:
    """The length a short prompt is padded to."""
    step = 32 if length <= 128 else 64
    return -(-length // step) * step


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
    qkv_ptr, rope_ptr, queries_ptr, keys_ptr, values_ptr, capacity,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BH: tl.constexpr, BKV: tl.constexpr,
):  # fmt: skip
    """Rotate one position's queries and keys; store its keys and values in the cache."""
    position = tl.program_id(0).to(tl.int64)
    qkv_ptr += position * (HEADS + 2 * KV_HEADS) * DIM
    kind = queries_ptr.dtype.element_ty
    d, h, kv = tl.arange(0, DIM)[None, :], tl.arange(0, BH)[:, None], tl.arange(0, BKV)[:, None]
    cos = tl.load(rope_ptr + position * DIM + (d & ~1))
    sin = tl.load(rope_ptr + position * DIM + (d | 1)) * tl.where((d & 1) == 0, -1.0, 1.0)
    q = tl.load(qkv_ptr + h * DIM + d, mask=h < HEADS, other=0.0).to(tl.float32)
    pair = tl.load(qkv_ptr + h * DIM + (d ^ 1), mask=h < HEADS, other=0.0).to(tl.float32)
    tl.store(queries_ptr + (position * HEADS + h) * DIM + d, (q * cos + pair * sin).to(kind), mask=h < HEADS)
    there = kv < KV_HEADS
    k = tl.load(qkv_ptr + (HEADS + kv) * DIM + d, mask=there, other=0.0).to(tl.float32)
    pair = tl.load(qkv_ptr + (HEADS + kv) * DIM + (d ^ 1), mask=there, other=0.0).to(tl.float32)
    v = tl.load(qkv_ptr + (HEADS + KV_HEADS + kv) * DIM + d, mask=there, other=0.0)
    slot = (kv.to(tl.int64) * capacity + position) * DIM + d
    tl.store(keys_ptr + slot, (k * cos + pair * sin).to(kind), mask=there)
    tl.store(values_ptr + slot, v, mask=there)


@triton.jit
def _gate_kernel(gate_up_ptr, out_ptr, M, BLOCK: tl.constexpr):
    """silu(gate) * up of one position and block of channels."""
    row, m = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + row * 2 * M + m, mask=m < M, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * M + M + m, mask=m < M, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * M + m, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=m < M)


def run(lm: LayeredLM, cache: KVCache, ids: Tensor) -> None:
    """Keys and values of (n,) tokens, at positions 0 .. n - 1 of the one row of the cache."""
    x, rope = lm.embed(ids), torch.view_as_real(lm.rope)
    for index, layer in enumerate(lm.layers):
        h = _norm(lm, x, layer.attention_norm)
        qkv = h @ layer.qkv if layer.qkv_bias is None else torch.addmm(layer.qkv_bias, h, layer.qkv)
        queries = _place(lm, cache, index, qkv, rope)
        if index + 1 == lm.n_layers:
            return  # nobody reads the states that leave it
        x = torch.addmm(x, _attend(lm, cache, index, queries), layer.out)
        x = torch.addmm(x, _gate(_norm(lm, x, layer.mlp_norm) @ layer.gate_up), layer.down)


def _norm(lm: LayeredLM, x: Tensor, weight: Tensor) -> Tensor:
    out, size = torch.empty_like(x), x.shape[-1]
    _norm_kernel[(len(x),)](x, weight, lm.norm_eps, out, size, BLOCK=triton.next_power_of_2(size), num_warps=8)
    return out


def _place(lm: LayeredLM, cache: KVCache, index: int, qkv: Tensor, rope: Tensor) -> Tensor:
    """(n, heads, D) rotated queries."""
    g, keys = lm.geometry, cache.keys[index]
    queries = torch.empty(len(qkv), g.heads, g.head_dim, dtype=qkv.dtype, device=qkv.device)
    _place_kernel[(len(qkv),)](
        qkv, rope, queries, keys, cache.values[index], keys.shape[2],
        HEADS=g.heads, KV_HEADS=g.kv_heads, DIM=g.head_dim, BH=triton.next_power_of_2(g.heads),
        BKV=triton.next_power_of_2(g.kv_heads), num_warps=8,
    )  # fmt: skip
    return queries


def _attend(lm: LayeredLM, cache: KVCache, index: int, queries: Tensor) -> Tensor:
    """(n, heads D), each position over itself and those before it."""
    g, stop = lm.geometry, len(queries)
    keys, values = cache.keys[index][:, :, :stop], cache.values[index][:, :, :stop]
    out = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None], keys, values, is_causal=True, enable_gqa=g.heads != g.kv_heads
    )
    return out[0].transpose(0, 1).reshape(stop, g.heads * g.head_dim)


def _gate(gate_up: Tensor) -> Tensor:
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    _gate_kernel[(rows, triton.cdiv(size, BLOCK))](gate_up, out, size, BLOCK=BLOCK, num_warps=4)
    return out
