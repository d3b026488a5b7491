"""Matrix products of a few rows, as fast as the weights can be read.

A decoding step at batch 1 multiplies 1 to 19 rows by every matrix of the model, so its time is that of reading the
matrices. This kernel reads a matrix once, with what surrounds the product fused in: the RMS norm before it, the bias,
the gate of the MLP, the residual after it.

The norm comes in two halves. Whoever writes the residual x also writes x * gain and, program by program, sums of x^2;
the product that follows takes x * gain and applies the scale, one number a row, to its sums. No order of additions is
left to chance, so results are the same from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024  # most programs whose sums of squares are kept
BLOCK = 1024  # channels a program of `gain` takes


@dataclass(frozen=True)
class Tiles:
    """Block sizes of a product: outputs and inputs at a time, warps, loads in flight; whether on tensor cores."""

    n: int
    k: int
    warps: int
    stages: int
    dot: bool


@cache
def tiling(rows: int, outputs: int, inputs: int, gated: bool) -> Tiles:
    """Block sizes as `benchmarks.engine_tiles` found them on an H200, for the shapes of 7B models."""
    if rows == 1:
        return Tiles(4, 1024, 4, 3, False) if gated or outputs > 20_000 else Tiles(8, 512, 2, 3, False)
    return Tiles(64, 128, 4, 3, True) if gated or outputs > inputs else Tiles(32, 256, 4, 5, True)


def row_block(rows: int) -> int:
    """Rows of a tile: one, or as tensor cores want them."""
    return 1 if rows == 1 else max(16, triton.next_power_of_2(rows))


@triton.jit
def _linear_kernel(
    x_ptr, squares_ptr, eps_ptr, w_ptr, bias_ptr, out_ptr, gain_ptr, gained_ptr, sums_ptr, state_ptr, K, N, STEPS,
    parts,
    ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    EVEN_K: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    DOT: tl.constexpr, OUT_AT_SLOT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    m, n = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    n_mask = n < N
    w_rows = w_ptr + n[:, None].to(tl.int64) * K
    if DOT:  # tensor cores
        acc, up = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    else:  # one row, its products kept apart until the end
        acc, up = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        k = step * BK + tl.arange(0, BK)
        if EVEN_K:
            w_mask, x_mask = n_mask[:, None], (m < ROWS)[:, None]
        else:
            w_mask, x_mask = n_mask[:, None] & (k < K)[None, :], (m < ROWS)[:, None] & (k < K)[None, :]
        w = tl.load(w_rows + k[None, :], mask=w_mask, other=0.0)  # (BN, BK)
        if GATED:
            v = tl.load(w_rows + N.to(tl.int64) * K + k[None, :], mask=w_mask, other=0.0)
        if DOT:
            x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=x_mask, other=0.0)  # (BM, BK)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
            if GATED:
                up = tl.dot(x, tl.trans(v), up, input_precision="ieee")
        else:
            x = tl.load(x_ptr + k[None, :], mask=x_mask, other=0.0).to(tl.float32)  # (1, BK)
            acc += w.to(tl.float32) * x
            if GATED:
                up += v.to(tl.float32) * x
    if DOT:
        y = acc
        if GATED:
            u = up
    else:
        y = tl.sum(acc, axis=1)[None, :]
        if GATED:
            u = tl.sum(up, axis=1)[None, :]
    if SCALED:
        part = tl.arange(0, PARTS)
        written = (part < parts)[:, None] & (m < ROWS)[None, :]
        squares = tl.sum(tl.load(squares_ptr + part[:, None] * ROWS + m[None, :], mask=written, other=0.0), axis=0)
        scale = tl.rsqrt(squares / K + tl.load(eps_ptr))[:, None]
        y = y * scale
        if GATED:
            u = u * scale
    if GATED:
        y = y * tl.sigmoid(y) * u
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    mask = (m < ROWS)[:, None] & n_mask[None, :]
    if RESIDUAL:
        slot = tl.load(state_ptr + 1)
        places = out_ptr + slot * N + m[:, None] * N + n[None, :]
        y += tl.load(places, mask=mask, other=0.0).to(tl.float32)
        kept = y.to(out_ptr.dtype.element_ty)
        tl.store(places, kept, mask=mask)
        wide = tl.where(mask, kept.to(tl.float32), 0.0)
        gain = tl.load(gain_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        tl.store(gained_ptr + m[:, None] * N + n[None, :], (wide * gain).to(gained_ptr.dtype.element_ty), mask=mask)
        tl.store(sums_ptr + tl.program_id(0) * ROWS + m, tl.sum(wide * wide, axis=1), mask=m < ROWS)
    else:
        if OUT_AT_SLOT:
            out_ptr += tl.load(state_ptr + 1) * N
        tl.store(out_ptr + m[:, None] * N + n[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gain_kernel(
    embedding_ptr, tokens_ptr, x_ptr, gain_ptr, gained_ptr, sums_ptr, state_ptr, H,
    ROWS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, EMBED: tl.constexpr,
):  # fmt: skip
    slot = tl.load(state_ptr + 1)
    m, h = tl.arange(0, BM), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (m < ROWS)[:, None] & (h < H)[None, :]
    places = x_ptr + slot * H + m[:, None] * H + h[None, :]
    if EMBED:
        given = tl.load(state_ptr + 3)
        token = tl.where(given >= 0, given, tl.load(tokens_ptr + slot))
        x = tl.load(embedding_ptr + token * H + m[:, None] * 0 + h[None, :], mask=mask, other=0.0)
        tl.store(places, x, mask=mask)
    else:
        x = tl.load(places, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    gain = tl.load(gain_ptr + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    tl.store(gained_ptr + m[:, None] * H + h[None, :], (wide * gain).to(gained_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + tl.program_id(0) * ROWS + m, tl.sum(wide * wide, axis=1), mask=m < ROWS)


@dataclass
class Gained:
    """States of `rows` slots times the gain of the norm that comes next, and the sums of their squares by program."""

    rows: int
    x: Tensor  # (rows, H)
    squares: Tensor  # (PROGRAMS, rows) float32, of which `parts` are written
    parts: int = 0

    @classmethod
    def empty(cls, rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Gained:
        return cls(
            rows, torch.zeros(rows, hidden, dtype=dtype, device=device), torch.zeros(PROGRAMS, rows, device=device)
        )


def gain(hidden: Tensor, norm: Tensor, out: Gained, state: Tensor, embed: tuple[Tensor, Tensor] | None = None) -> None:
    """The first half of an RMS norm of the states from the open slot, state[1], on.

    embed: (V, H) embedding and (.,) tokens of the slots: the slot's state is its token's, or that of token state[3]
        where it is not -1.
    """
    size = hidden.shape[-1]
    embedding, tokens = embed or (hidden, state)
    out.parts = triton.cdiv(size, BLOCK)
    _gain_kernel[(out.parts,)](
        embedding, tokens, hidden, norm, out.x, out.squares, state, size,
        ROWS=out.rows, BM=row_block(out.rows), BLOCK=BLOCK, EMBED=embed is not None, num_warps=4,
    )  # fmt: skip


def linear(
    x: Tensor | Gained,
    weight: Tensor,
    out: Tensor,
    state: Tensor,
    rows: int,
    *,
    eps: Tensor | None = None,
    bias: Tensor | None = None,
    gated: bool = False,
    out_at_slot: bool = False,
    residual: tuple[Tensor, Gained] | None = None,
    tiles: Tiles | None = None,
) -> None:
    """out = norm(x) @ weight (+ bias) of `rows` rows.

    Args:
        x: (at least rows, K) contiguous, taken as it is; or the first half of its norm, whose scale is then applied.
        weight: (K, N), a transposed view of contiguous (N, K); with `gated` (K, 2 N), gates first.
        out: (at least rows, N) contiguous; with `gated` silu(gate) * up.
        state: (.,) int64; state[1] is the open slot, at which out's rows begin with `out_at_slot` or `residual`.
        eps: 0-d, of the norm.
        residual: out is added to, not replaced; (gain of the norm that comes next, where its first half goes).
    """
    inputs, outputs = weight.shape[0], out.shape[-1]
    tiles = tiles or tiling(rows, outputs, inputs, gated)
    # Tiles are of 2-byte numbers: of wider ones half as many fit.
    block_k = min(tiles.k * 2 // weight.dtype.itemsize, triton.next_power_of_2(inputs))
    programs = triton.cdiv(outputs, tiles.n)
    scaled = isinstance(x, Gained)
    source, squares, parts = (x.x, x.squares, x.parts) if isinstance(x, Gained) else (x, state, 0)
    norm, after = residual or (state, None)
    if after is not None:
        after.parts = programs
    _linear_kernel[(programs,)](
        source, squares, eps if scaled else state, weight, bias if bias is not None else state, out,
        norm, after.x if after else state, after.squares if after else state, state,
        inputs, outputs, triton.cdiv(inputs, block_k),
    parts,
        ROWS=rows, BM=row_block(rows) if tiles.dot else 1, BN=tiles.n, BK=block_k, STAGES=tiles.stages,
        EVEN_K=inputs % block_k == 0, SCALED=scaled, BIAS=bias is not None, RESIDUAL=residual is not None, GATED=gated,
        DOT=tiles.dot, OUT_AT_SLOT=out_at_slot, PARTS=triton.next_power_of_2(max(parts, 1)),
        num_warps=tiles.warps,
    )  # fmt: skip
