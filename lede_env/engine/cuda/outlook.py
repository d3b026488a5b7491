"""What the acceptance head says of a draft, on the device: three small kernels after the read-out that drew it.

As `AcceptanceHead.read`, whose inputs are the un-normed state and the read-out. Sums are float32, and nothing is
rounded between: in half precision `rms_norm` rounds the normed state, here it stays float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lede_env.engine.acceptance_head import STEEPEST, SURE, AcceptanceHead
from lede_env.engine.read_signals import ODDS, SLOPE, TOKEN, TOKEN_LOGIT
from lede_env.engine.signals import LOG_FLOOR, OUTLOOK

UNITS = 16  # that a program computes
BLOCK = 256  # inputs of them at a time


@triton.jit
def _first_kernel(
    hidden_ptr, norm_ptr, eps_ptr, weight_ptr, rows_ptr, signals_ptr, bias_ptr, out_ptr, units_ptr, state_ptr,
    H, D, U, ROWS, STEPS, warmth,
    BH: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, MOST: tl.constexpr, TOKEN: tl.constexpr,
    TOKEN_LOGIT: tl.constexpr,
):  # fmt: skip
    """Units of the first layer. The norm's scale, one number, is applied to the sums, as in `linear`."""
    hidden_ptr += tl.load(state_ptr + 1) * H
    h, n = tl.arange(0, BH), tl.program_id(0) * BN + tl.arange(0, BN)
    whole = tl.load(hidden_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    acc = tl.zeros((BK, BN), tl.float32)
    for step in tl.range(0, STEPS):
        k = step * BK + tl.arange(0, BK)
        x = tl.load(hidden_ptr + k, mask=k < D, other=0.0).to(tl.float32)
        x *= tl.load(norm_ptr + k, mask=k < D, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + k[:, None] * U + n[None, :], mask=(k < D)[:, None] & (n < U)[None, :], other=0.0)
        acc += x[:, None] * w
    y = tl.sum(acc, axis=0) * tl.rsqrt(tl.sum(whole * whole, axis=0) / H + tl.load(eps_ptr))
    best = tl.load(out_ptr)
    margin = tl.minimum(best - tl.load(out_ptr + 1), MOST) / 4
    shortfall = tl.minimum(best - tl.load(out_ptr + TOKEN_LOGIT), MOST) / 4
    y += margin * tl.load(signals_ptr + n, mask=n < U, other=0.0)
    y += shortfall * tl.load(signals_ptr + U + n, mask=n < U, other=0.0)
    y += warmth * 2 * tl.load(signals_ptr + 2 * U + n, mask=n < U, other=0.0)
    row = tl.minimum(tl.load(out_ptr + TOKEN).to(tl.int32), ROWS - 1).to(tl.int64)
    y += tl.load(rows_ptr + row * U + n, mask=n < U, other=0.0) + tl.load(bias_ptr + n, mask=n < U, other=0.0)
    tl.store(units_ptr + n, tl.maximum(y, 0.0), mask=n < U)


@triton.jit
def _middle_kernel(x_ptr, weight_ptr, bias_ptr, units_ptr, U, STEPS, BK: tl.constexpr, BN: tl.constexpr):
    """Units of the second layer."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BK, BN), tl.float32)
    for step in tl.range(0, STEPS):
        k = step * BK + tl.arange(0, BK)
        x = tl.load(x_ptr + k, mask=k < U, other=0.0)
        w = tl.load(weight_ptr + k[:, None] * U + n[None, :], mask=(k < U)[:, None] & (n < U)[None, :], other=0.0)
        acc += x[:, None] * w
    y = tl.sum(acc, axis=0) + tl.load(bias_ptr + n, mask=n < U, other=0.0)
    tl.store(units_ptr + n, tl.maximum(y, 0.0), mask=n < U)


@triton.jit
def _last_kernel(
    x_ptr, weight_ptr, bias_ptr, sure_ptr, out_ptr, U,
    BK: tl.constexpr, BN: tl.constexpr, COUNT: tl.constexpr, ODDS: tl.constexpr, SLOPE: tl.constexpr,
    TOKEN_LOGIT: tl.constexpr, STEEPEST: tl.constexpr, SURE: tl.constexpr,
):  # fmt: skip
    """The COUNT numbers it says, into the read-out from ODDS on."""
    k, n = tl.arange(0, BK), tl.arange(0, BN)
    x = tl.load(x_ptr + k, mask=k < U, other=0.0)
    w = tl.load(weight_ptr + k[:, None] * COUNT + n[None, :], mask=(k < U)[:, None] & (n < COUNT)[None, :], other=0.0)
    y = tl.sum(x[:, None] * w, axis=0) + tl.load(bias_ptr + n, mask=n < COUNT, other=0.0)
    best = tl.load(out_ptr)
    sure = (best - tl.load(out_ptr + 1) >= SURE) & (best == tl.load(out_ptr + TOKEN_LOGIT))
    y = tl.where(sure, tl.load(sure_ptr + n, mask=n < COUNT, other=0.0), y)
    slope = tl.exp(tl.minimum(tl.maximum(y, -STEEPEST), STEEPEST))
    tl.store(out_ptr + ODDS + n, tl.where(n == SLOPE - ODDS, slope, y), mask=n < COUNT)


class Outlook:
    """The kernels for one acceptance head, with the scratch memory between them.

    norm: (H,) gain of the final norm, and `eps`, 0-d, what it adds to the mean square.
    """

    def __init__(self, head: AcceptanceHead, norm: Tensor, eps: Tensor):
        self.head, self.norm, self.eps = head, norm, eps
        self.first, self.second = torch.empty(2, len(head.middle), device=norm.device)

    def __call__(self, hidden: Tensor, out: Tensor, state: Tensor, candidate: int, warmth: float) -> None:
        """Add odds, slope and ahead of the draft to its read-out, `out`, (SIZE,) float32.

        Args:
            hidden: (., H) un-normed states, contiguous, as the drafts were drawn from.
            state: (.,) int64: state[1] is the open slot.
            candidate: place of the layer among the head's candidates.
            warmth: T / (1 + T).
        """
        head, size = self.head, hidden.shape[-1]
        d, units = head.state.shape
        block_d, block_u = (min(BLOCK, triton.next_power_of_2(inputs)) for inputs in (d, units))
        grid = (triton.cdiv(units, UNITS),)
        _first_kernel[grid](
            hidden, self.norm, self.eps, head.state, head.token, head.signals, head.bias[candidate], out, self.first,
            state, size, d, units, len(head.token), triton.cdiv(d, block_d), warmth,
            BH=triton.next_power_of_2(size), BK=block_d, BN=UNITS, MOST=-LOG_FLOOR, TOKEN=TOKEN,
            TOKEN_LOGIT=TOKEN_LOGIT, num_warps=8,
        )  # fmt: skip
        _middle_kernel[grid](
            self.first, head.middle, head.middle_bias, self.second, units, triton.cdiv(units, block_u),
            BK=block_u, BN=UNITS, num_warps=4,
        )  # fmt: skip
        _last_kernel[(1,)](
            self.second, head.out, head.out_bias, head.sure, out, units,
            BK=triton.next_power_of_2(units), BN=triton.next_power_of_2(OUTLOOK), COUNT=OUTLOOK, ODDS=ODDS, SLOPE=SLOPE,
            TOKEN_LOGIT=TOKEN_LOGIT, STEEPEST=STEEPEST, SURE=SURE, num_warps=4,
        )  # fmt: skip
