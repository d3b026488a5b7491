"""Rotary attention of a few new positions over the KV cache in use, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # cached positions at a time
PROGRAMS = 256  # of one new row, at most: about two a multiprocessor of an H100 or H200
SPLITS = 8  # of the positions, for several new rows: joining the parts of more takes longer than they save


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
def _absorb(q, k, v, seen, scale, best, total, acc):
    """One block of keys and values into a running softmax: its maximum (R,), sum (R,) and weighted values (R, DIM)."""
    score = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -1e30)
    higher = tl.maximum(best, tl.max(score, axis=1))
    weight = tl.exp(score - higher[:, None])
    shrink = tl.exp(best - higher)
    total = total * shrink + tl.sum(weight, axis=1)
    acc = acc * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    return higher, total, acc


@triton.jit
def _turned_row(base_ptr, rope_ptr, position, d, DIM: tl.constexpr):
    """(DIM,) of one head, rotated to its position."""
    x = tl.load(base_ptr + d).to(tl.float32)
    pair = tl.load(base_ptr + (d ^ 1)).to(tl.float32)
    cos = tl.load(rope_ptr + position * DIM + (d & ~1))
    sin = tl.load(rope_ptr + position * DIM + (d | 1))
    return x * cos + pair * tl.where((d & 1) == 0, -sin, sin)


@triton.jit
def _attend_one_kernel(
    qkv_ptr, keys_ptr, values_ptr, rope_ptr, out_ptr, part_ptr, stats_ptr, arrived_ptr, state_ptr, scale, capacity,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """As `_attention_kernel` for one new row of a query head: too little for tensor cores. The last split takes the
    new position along with its share. Each block is loaded before the one ahead of it is used, the first one before
    the query is there."""
    head, split = tl.program_id(0), tl.program_id(1)
    start = tl.load(state_ptr) + tl.load(state_ptr + 1)  # position of the new row
    group: tl.constexpr = HEADS // KV_HEADS
    kv = head // group
    keys_ptr += kv.to(tl.int64) * capacity * DIM
    values_ptr += kv.to(tl.int64) * capacity * DIM
    d = tl.arange(0, DIM)
    kind = qkv_ptr.dtype.element_ty
    span = tl.cdiv(tl.cdiv(start, BT), SPLITS) * BT
    begin = split * span
    end = tl.minimum(begin + span, start)
    t = begin + tl.arange(0, BT)
    place = t[:, None] * DIM + d[None, :]
    k = tl.load(keys_ptr + place, mask=(t < end)[:, None], other=0.0)  # (BT, DIM)
    v = tl.load(values_ptr + place, mask=(t < end)[:, None], other=0.0)
    q = _turned_row(qkv_ptr + head * DIM, rope_ptr, start, d, DIM).to(kind).to(tl.float32)
    best = -1e30
    total = 0.0
    acc = tl.zeros((DIM,), tl.float32)
    if split == SPLITS - 1:
        fresh_k = _turned_row(qkv_ptr + (HEADS + kv) * DIM, rope_ptr, start, d, DIM).to(kind)
        fresh_v = tl.load(qkv_ptr + (HEADS + KV_HEADS + kv) * DIM + d)
        if head % group == 0:
            tl.store(keys_ptr + start * DIM + d, fresh_k)
            tl.store(values_ptr + start * DIM + d, fresh_v)
        best = tl.sum(q * fresh_k.to(tl.float32), axis=0) * scale
        total = 1.0
        acc = fresh_v.to(tl.float32)
    for first in tl.range(begin, end, BT):
        t = first + BT + tl.arange(0, BT)
        place = t[:, None] * DIM + d[None, :]
        next_k = tl.load(keys_ptr + place, mask=(t < end)[:, None], other=0.0)
        next_v = tl.load(values_ptr + place, mask=(t < end)[:, None], other=0.0)
        score = tl.where(t - BT < end, tl.sum(k.to(tl.float32) * q[None, :], axis=1) * scale, -1e30)
        higher = tl.maximum(best, tl.max(score, axis=0))
        weight = tl.exp(score - higher)
        shrink = tl.exp(best - higher)
        total = total * shrink + tl.sum(weight, axis=0)
        acc = acc * shrink + tl.sum(v.to(tl.float32) * weight[:, None], axis=0)
        best, k, v = higher, next_k, next_v
    mine = head * SPLITS + split
    tl.store(part_ptr + mine * DIM + d, acc)
    tl.store(stats_ptr + mine * 2, best)
    tl.store(stats_ptr + mine * 2 + 1, total)
    tl.debug_barrier()  # all of this program's stores come before its arrival
    if tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel") == SPLITS - 1:
        every = head * SPLITS + tl.arange(0, SPLITS)
        tops = tl.load(stats_ptr + every * 2, cache_modifier=".cg")
        sums = tl.load(stats_ptr + every * 2 + 1, cache_modifier=".cg")
        parts = tl.load(part_ptr + every[:, None] * DIM + d[None, :], cache_modifier=".cg")  # (SPLITS, DIM)
        share = tl.exp(tops - tl.max(tops, axis=0))
        joined = tl.sum(parts * share[:, None], axis=0) / tl.sum(sums * share, axis=0)
        tl.store(out_ptr + head * DIM + d, joined.to(out_ptr.dtype.element_ty))
        tl.store(arrived_ptr + head, 0)


@triton.jit
def _attention_kernel(
    qkv_ptr, keys_ptr, values_ptr, rope_ptr, out_ptr, part_ptr, stats_ptr, arrived_ptr, state_ptr, scale, capacity,
    ROWS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr,
    BR: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One KV head, one split of the positions: as many as there are blocks share the cached ones, the next has the new
    positions and stores their keys and values, the rest have nothing to do. The last to finish joins the parts."""
    head, split = tl.program_id(0), tl.program_id(1)
    start = tl.load(state_ptr) + tl.load(state_ptr + 1)  # position of the first new row
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM  # of a row of qkv
    keys_ptr += head.to(tl.int64) * capacity * DIM
    values_ptr += head.to(tl.int64) * capacity * DIM
    r, d = tl.arange(0, BR), tl.arange(0, DIM)
    query, valid = r // GROUP, r < ROWS * GROUP
    heads = head * GROUP + r % GROUP  # query heads of this KV head
    span = tl.maximum(tl.cdiv(tl.cdiv(start, BT), SPLITS - 1), 1) * BT
    used = tl.cdiv(start, span) + 1
    if split >= used:
        return
    begin = split * span
    end = tl.minimum(begin + span, start)
    q = _turned(qkv_ptr, query * width + heads * DIM, valid, rope_ptr, start + query, d, DIM)
    q = q.to(qkv_ptr.dtype.element_ty)  # (BR, DIM)
    best = tl.full((BR,), -1e30, tl.float32)
    total = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, DIM), tl.float32)
    for first in tl.range(begin, end, BT):
        t = first + tl.arange(0, BT)
        place = t[:, None] * DIM + d[None, :]
        k = tl.load(keys_ptr + place, mask=(t < end)[:, None], other=0.0)  # (BT, DIM)
        v = tl.load(values_ptr + place, mask=(t < end)[:, None], other=0.0)
        best, total, acc = _absorb(q, k, v, (t < end)[None, :], scale, best, total, acc)
    if split == used - 1:
        j = tl.arange(0, BJ)
        new = j < ROWS
        at = j * width + (HEADS + head) * DIM
        fresh_k = _turned(qkv_ptr, at, new, rope_ptr, start + j, d, DIM).to(qkv_ptr.dtype.element_ty)  # (BJ, DIM)
        fresh_v = tl.load(qkv_ptr + (at + KV_HEADS * DIM)[:, None] + d[None, :], mask=new[:, None], other=0.0)
        goal = (start + j)[:, None] * DIM + d[None, :]
        tl.store(keys_ptr + goal, fresh_k, mask=new[:, None])
        tl.store(values_ptr + goal, fresh_v, mask=new[:, None])
        # States of padding grow from round to round; in float16 they overflow, and a weight of 0 would not undo that.
        fresh_v = tl.where(tl.abs(fresh_v) < float("inf"), fresh_v, 0.0)
        seen = (j[None, :] <= query[:, None]) & new[None, :]
        best, total, acc = _absorb(q, fresh_k, fresh_v, seen, scale, best, total, acc)
    part = part_ptr + ((head * SPLITS + split) * BR + r)[:, None] * DIM + d[None, :]
    stats = stats_ptr + (head * SPLITS + split) * 2 * BR + r
    tl.store(part, acc, mask=valid[:, None])
    tl.store(stats, best)
    tl.store(stats + BR, total)
    tl.debug_barrier()  # all of this program's stores come before its arrival
    if tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel") == used - 1:
        every = tl.arange(0, SPLITS)
        took_part = every < used
        theirs = stats_ptr + (head * SPLITS + every) * 2 * BR
        there = took_part[:, None] & valid[None, :]
        bests = tl.load(theirs[:, None] + r[None, :], mask=there, other=-1e30, cache_modifier=".cg")  # (SPLITS, BR)
        weights = tl.exp(bests - tl.max(bests, axis=0)[None, :])
        sums = tl.load(theirs[:, None] + BR + r[None, :], mask=there, other=0.0, cache_modifier=".cg")
        total_sum = tl.sum(sums * weights, axis=0)
        merged = tl.zeros((BR, DIM), tl.float32)
        for other in tl.static_range(SPLITS):
            its = part_ptr + ((head * SPLITS + other) * BR + r)[:, None] * DIM + d[None, :]
            portion = tl.sum(tl.where((every == other)[:, None], weights, 0.0), axis=0)  # (BR,)
            known = valid[:, None] & (other < used)
            merged += tl.load(its, mask=known, other=0.0, cache_modifier=".cg") * portion[:, None]
        result = out_ptr + query[:, None] * (HEADS * DIM) + heads[:, None] * DIM + d[None, :]
        merged = merged / total_sum[:, None]
        tl.store(result, merged.to(out_ptr.dtype.element_ty), mask=valid[:, None])
        tl.store(arrived_ptr + head, 0)


class Attention:
    """The kernel for one model and number of new rows, with the scratch memory its splits meet in."""

    def __init__(self, rows: int, heads: int, kv_heads: int, dim: int, device: torch.device):
        self.rows, self.heads, self.kv_heads, self.dim = rows, heads, kv_heads, dim
        self.group = heads // kv_heads
        self.block = max(16, triton.next_power_of_2(rows * self.group))  # query rows of a KV head
        self.warps = 4 if self.block <= 32 else 8
        one = min(32, max(2, 1 << (PROGRAMS // heads).bit_length() - 1))
        self.splits = one if rows == 1 else SPLITS
        shape = (heads, self.splits, 1) if rows == 1 else (kv_heads, self.splits, self.block)
        self.part = torch.empty(*shape, dim, device=device)
        self.stats = torch.empty(*shape, 2, device=device)
        self.arrived = torch.zeros(heads, dtype=torch.int32, device=device)

    def __call__(self, qkv: Tensor, keys: Tensor, values: Tensor, rope: Tensor, out: Tensor, state: Tensor) -> None:
        """Store the new keys and values, attend, and write (rows, heads D) to `out`.

        Args:
            qkv: (rows, (heads + 2 kv_heads) D), not rotated.
            keys, values: (1, kv_heads, capacity, D) of the layer.
            rope: (positions, D / 2, 2) float32 cosines and sines.
            state: (.,) int64: state[0] + state[1] is the position of the first row.
        """
        tensors = (qkv, keys, values, rope, out, self.part, self.stats, self.arrived, state)
        if self.rows == 1:
            _attend_one_kernel[(self.heads, self.splits)](
                *tensors, self.dim**-0.5, keys.shape[2],
                HEADS=self.heads, KV_HEADS=self.kv_heads, DIM=self.dim, BT=BLOCK, SPLITS=self.splits,
                num_warps=4, num_stages=2,
            )  # fmt: skip
            return
        _attention_kernel[(self.kv_heads, self.splits)](
            *tensors, self.dim**-0.5, keys.shape[2],
            ROWS=self.rows, HEADS=self.heads, KV_HEADS=self.kv_heads, DIM=self.dim, GROUP=self.group,
            BR=self.block, BJ=max(16, triton.next_power_of_2(self.rows)), BT=BLOCK, SPLITS=self.splits,
            num_warps=self.warps, num_stages=2,
        )  # fmt: skip
