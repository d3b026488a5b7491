"""Matrix products of a few rows, as fast as the weights can be read.

A decoding step at batch 1 multiplies 1 to 19 rows by every matrix of the model, so its time is that of reading the
matrices. This kernel reads a matrix once, with what surrounds the product fused in: the RMS norm before it (its scale
is one number a row, applied after the sum), the bias, the gate of the MLP, the residual after it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _linear_kernel(
    x_ptr, gain_ptr, eps_ptr, w_ptr, bias_ptr, out_ptr, state_ptr, K, N, STEPS,
    ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    X_AT_SLOT: tl.constexpr, OUT_AT_SLOT: tl.constexpr,
):  # fmt: skip
    slot = tl.load(state_ptr + 1)
    if X_AT_SLOT:
        x_ptr += slot * K
    if OUT_AT_SLOT:
        out_ptr += slot * N
    m, n = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    n_mask = n < N
    w_rows = w_ptr + n[:, None].to(tl.int64) * K
    if ROWS == 1:  # products are kept apart until the end: (BN, BK); squares (BK,)
        acc, up = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
        squares = tl.zeros((BK,), tl.float32)
    else:  # tensor cores: (BM, BN); squares (BM,)
        acc, up = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        squares = tl.zeros((BM,), tl.float32)
    for step in tl.range(0, STEPS):
        k = step * BK + tl.arange(0, BK)
        if EVEN_K:
            w = tl.load(w_rows + k[None, :], mask=n_mask[:, None], other=0.0)  # (BN, BK)
            if GATED:
                v = tl.load(w_rows + N.to(tl.int64) * K + k[None, :], mask=n_mask[:, None], other=0.0)
        else:
            w = tl.load(w_rows + k[None, :], mask=n_mask[:, None] & (k < K)[None, :], other=0.0)
            if GATED:
                v = tl.load(
                    w_rows + N.to(tl.int64) * K + k[None, :], mask=n_mask[:, None] & (k < K)[None, :], other=0.0
                )
        if ROWS == 1:
            x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)  # (BK,)
            if NORM:
                squares += x * x
                x = x * tl.load(gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            acc += w.to(tl.float32) * x[None, :]
            if GATED:
                up += v.to(tl.float32) * x[None, :]
        else:
            x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < ROWS)[:, None] & (k < K)[None, :], other=0.0)
            if NORM:
                wide = x.to(tl.float32)
                squares += tl.sum(wide * wide, axis=1)
                x = (wide * tl.load(gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]).to(w.dtype)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
            if GATED:
                up = tl.dot(x, tl.trans(v), up, input_precision="ieee")
    if ROWS == 1:
        y = tl.sum(acc, axis=1)[None, :]  # (1, BN)
        if GATED:
            u = tl.sum(up, axis=1)[None, :]
        if NORM:
            scale = tl.rsqrt(tl.sum(squares, axis=0) / K + tl.load(eps_ptr))
        places, mask = out_ptr + n[None, :], n_mask[None, :]
    else:
        y = acc
        if GATED:
            u = up
        if NORM:
            scale = tl.rsqrt(squares / K + tl.load(eps_ptr))[:, None]
        places, mask = out_ptr + m[:, None] * N + n[None, :], (m < ROWS)[:, None] & n_mask[None, :]
    if NORM:
        y = y * scale
    if GATED:
        if NORM:
            u = u * scale
        y = y * tl.sigmoid(y) * u
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        y += tl.load(places, mask=mask, other=0.0).to(tl.float32)
    tl.store(places, y.to(out_ptr.dtype.element_ty), mask=mask)


@cache
def tiling(rows: int, outputs: int, inputs: int, gated: bool) -> dict[str, int]:
    """Block sizes of a product, as a sweep on an H200 chose them for the shapes of 1B to 34B models."""
    if rows == 1:
        return {"BN": 4 if gated else 8, "BK": 512, "num_warps": 4, "num_stages": 1}
    return {"BN": 16 if gated else 32, "BK": 256, "num_warps": 4, "num_stages": 3}


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    state: Tensor,
    rows: int,
    *,
    norm: Tensor | None = None,
    eps: Tensor | None = None,
    bias: Tensor | None = None,
    residual: bool = False,
    gated: bool = False,
    x_at_slot: bool = False,
    out_at_slot: bool = False,
    tiles: dict[str, int] | None = None,
) -> None:
    """out = norm(x) @ weight (+ bias), for the first `rows` rows of x, or those from the open slot on.

    Args:
        x: (at least rows, K) contiguous.
        weight: (K, N), a transposed view of contiguous (N, K); with `gated` (K, 2 N), gates first.
        out: (at least rows, N) contiguous; with `residual` added to, with `gated` silu(gate) * up.
        state: (.,) int64; state[1] is the slot at which rows begin where `x_at_slot` or `out_at_slot`.
        norm, eps: (K,) gain and 0-d epsilon of an RMS norm of x.
    """
    inputs, outputs = weight.shape[0], out.shape[-1]
    tiles = tiles or tiling(rows, outputs, inputs, gated)
    block_n, block_k = tiles["BN"], min(tiles["BK"], triton.next_power_of_2(inputs))
    grid = (triton.cdiv(outputs, block_n),)
    _linear_kernel[grid](
        x, norm if norm is not None else x, eps if eps is not None else x, weight, bias if bias is not None else x,
        out, state, inputs, outputs, triton.cdiv(inputs, block_k),
        ROWS=rows, BM=max(16, triton.next_power_of_2(rows)), BN=block_n, BK=block_k, EVEN_K=inputs % block_k == 0,
        NORM=norm is not None, BIAS=bias is not None, RESIDUAL=residual, GATED=gated,
        X_AT_SLOT=x_at_slot, OUT_AT_SLOT=out_at_slot, num_warps=tiles["num_warps"], num_stages=tiles["num_stages"],
    )  # fmt: skip


@triton.jit
def _embed_kernel(embedding_ptr, tokens_ptr, hidden_ptr, state_ptr, H, BLOCK: tl.constexpr):
    slot = tl.load(state_ptr + 1)
    h = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    given = tl.load(state_ptr + 3)
    token = tl.where(given >= 0, given, tl.load(tokens_ptr + slot))
    x = tl.load(embedding_ptr + token * H + h, mask=h < H, other=0.0)
    tl.store(hidden_ptr + slot * H + h, x, mask=h < H)


def embed(embedding: Tensor, tokens: Tensor, hidden: Tensor, state: Tensor) -> None:
    """hidden[slot] = the embedding of tokens[slot], at the open slot state[1]; of state[3] where that is not -1."""
    size = embedding.shape[1]
    _embed_kernel[(triton.cdiv(size, 1024),)](embedding, tokens, hidden, state, size, BLOCK=1024)
