"""Rotary attention of a few new positions over the KV cache in use, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lede_env.engine.cuda.linear import LAUNCH, PDL, wait_for_earlier

BLOCK = 64  # cached positions at a time
PROGRAMS = 264  # two a multiprocessor of an H100 or H200: what the splits aim at


@triton.jit
def _turned(base_ptr, offsets, mask, rope_ptr, positions, d, DIM: tl.constexpr):
    """(R, DIM) heads at `offsets`, rotated to their positions: neighbouring channels are a rotary pair."""
    x = tl.load(base_ptr + offsets[:, None] + d[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    pair = tl.load(base_ptr + offsets[:, None] + (d ^ 1)[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    angle = rope_ptr + positions[:, None] * DIM + (d & ~1)[None, :]
    cos = tl.load(angle, mask=mask[:, None], other=0.0)
    sin = tl.load(angle + 1, mask=mask[:, None], other=0.0)
    return x * cos + pair * tl.where((d & 1) == 0, -sin, sin)


@triton.jit
def _attention_kernel(
    qkv_ptr, keys_ptr, values_ptr, rope_ptr, out_ptr, part_ptr, stats_ptr, arrived_ptr, state_ptr, scale, capacity,
    ROWS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr,
    BR: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One KV head, one split of the cached positions. The last split also attends to the new positions, and stores
    their keys and values; the last split to finish joins the parts."""
    wait_for_earlier(PDL)
    head, split = tl.program_id(0), tl.program_id(1)
    start = tl.load(state_ptr) + tl.load(state_ptr + 1)  # position of the first new row
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM  # of a row of qkv
    keys_ptr += head.to(tl.int64) * capacity * DIM
    values_ptr += head.to(tl.int64) * capacity * DIM
    r, d = tl.arange(0, BR), tl.arange(0, DIM)
    query, valid = r // GROUP, r < ROWS * GROUP
    heads = head * GROUP + r % GROUP  # query heads of this KV head
    q = _turned(qkv_ptr, query * width + heads * DIM, valid, rope_ptr, start + query, d, DIM)
    q = q.to(qkv_ptr.dtype.element_ty)  # (BR, DIM)
    best = tl.full((BR,), -1e30, tl.float32)  # running maximum, sum and weighted values of a softmax
    total = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, DIM), tl.float32)
    span = tl.cdiv(tl.cdiv(start, BT), SPLITS) * BT
    begin = split * span
    end = tl.minimum(begin + span, start)
    for first in tl.range(begin, end, BT):
        t = first + tl.arange(0, BT)
        place = t[:, None] * DIM + d[None, :]
        k = tl.load(keys_ptr + place, mask=(t < end)[:, None], other=0.0)  # (BT, DIM)
        v = tl.load(values_ptr + place, mask=(t < end)[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BR, BT)
        score = tl.where((t < end)[None, :], score, -1e30)
        higher = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(best - higher)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        best = higher
    if split == SPLITS - 1:
        j = tl.arange(0, BJ)
        new = j < ROWS
        at = j * width + (HEADS + head) * DIM
        k = _turned(qkv_ptr, at, new, rope_ptr, start + j, d, DIM).to(qkv_ptr.dtype.element_ty)
        v = tl.load(qkv_ptr + (at + KV_HEADS * DIM)[:, None] + d[None, :], mask=new[:, None], other=0.0)
        place = (start + j)[:, None] * DIM + d[None, :]
        tl.store(keys_ptr + place, k, mask=new[:, None])
        tl.store(values_ptr + place, v, mask=new[:, None])
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where((j[None, :] <= query[:, None]) & new[None, :], score, -1e30)
        higher = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(best - higher)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        best = higher
    result = out_ptr + query[:, None] * (HEADS * DIM) + heads[:, None] * DIM + d[None, :]
    if SPLITS == 1:
        tl.store(result, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=valid[:, None])
    else:
        part = part_ptr + ((head * SPLITS + split) * BR + r)[:, None] * DIM + d[None, :]
        stats = stats_ptr + (head * SPLITS + split) * 2 * BR + r
        tl.store(part, acc, mask=valid[:, None])
        tl.store(stats, best)
        tl.store(stats + BR, total)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        if tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel") == SPLITS - 1:
            every = tl.arange(0, SPLITS)
            stats = stats_ptr + (head * SPLITS + every)[:, None] * 2 * BR + r[None, :]
            bests = tl.load(stats, cache_modifier=".cg")  # (SPLITS, BR)
            weights = tl.exp(bests - tl.max(bests, axis=0)[None, :])
            total = tl.sum(tl.load(stats + BR, cache_modifier=".cg") * weights, axis=0)
            acc = tl.zeros((BR, DIM), tl.float32)
            for other in tl.static_range(SPLITS):
                part = part_ptr + ((head * SPLITS + other) * BR + r)[:, None] * DIM + d[None, :]
                weight = tl.sum(tl.where((every == other)[:, None], weights, 0.0), axis=0)  # (BR,)
                acc += tl.load(part, mask=valid[:, None], other=0.0, cache_modifier=".cg") * weight[:, None]
            tl.store(result, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=valid[:, None])
            tl.store(arrived_ptr + head, 0)


class Attention:
    """The kernel for one model and number of new rows, with the scratch memory its splits meet in."""

    def __init__(self, rows: int, heads: int, kv_heads: int, dim: int, device: torch.device):
        self.rows, self.heads, self.kv_heads, self.dim = rows, heads, kv_heads, dim
        self.group = heads // kv_heads
        self.block = max(16, triton.next_power_of_2(rows * self.group))  # query rows of a KV head
        self.splits = max(1, 1 << (PROGRAMS // kv_heads).bit_length() - 1)
        self.part = torch.empty(kv_heads, self.splits, self.block, dim, device=device)
        self.stats = torch.empty(kv_heads, self.splits, 2, self.block, device=device)
        self.arrived = torch.zeros(kv_heads, dtype=torch.int32, device=device)

    def __call__(self, qkv: Tensor, keys: Tensor, values: Tensor, rope: Tensor, out: Tensor, state: Tensor) -> None:
        """Store the new keys and values, attend, and write (rows, heads D) to `out`.

        Args:
            qkv: (rows, (heads + 2 kv_heads) D), not rotated.
            keys, values: (1, kv_heads, capacity, D) of the layer.
            rope: (positions, D / 2, 2) float32 cosines and sines.
            state: (.,) int64: state[0] + state[1] is the position of the first row.
        """
        _attention_kernel[(self.kv_heads, self.splits)](
            qkv, keys, values, rope, out, self.part, self.stats, self.arrived, state, self.dim**-0.5, keys.shape[2],
            ROWS=self.rows, HEADS=self.heads, KV_HEADS=self.kv_heads, DIM=self.dim, GROUP=self.group,
            BR=self.block, BJ=max(16, triton.next_power_of_2(self.rows)), BT=BLOCK, SPLITS=self.splits,
            PDL=PDL, num_warps=4, num_stages=2, **LAUNCH,
        )  # fmt: skip
