"""Products of a few rows on a CPU, with matrices laid out anew for them.

`@` hands a product to MKL, which is the fastest where it was made for: on Intel's processors, up to some 16 rows. The
layouts here are for the rest, each a second copy of the weights. What they gain was measured on the embedded model.

- `turned`, on AMD processors, up to 4 rows: matrices are (outputs, inputs), and the product is taken from their side.
  Then MKL has another kernel, which takes little longer for 4 rows than for 2: a layer of 1 row 443 -> 385 us, of 3,
  which oneDNN took before, 490 -> 427, of 4 490 -> 457. It has none for a single row, which therefore is doubled.
- `packed`, for more rows: oneDNN, whose matrices are laid out once, where MKL does so at every call. On an AMD EPYC
  MKL takes twice as long from 2 rows on, on a Xeon a third longer from 30. By the operators that `torch.compile` calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lede_env.engine.processor import processor_name

if TYPE_CHECKING:
    from lede_env.engine.layered_lm import Layer, LayeredLM

AMD = processor_name().startswith("AMD ")
TURNED = 4 if AMD else 0  # most rows that gain by matrices turned round
PACKED = 5 if AMD else 16  # fewest that gain by oneDNN
LAID_OUT_FOR = 16  # rows, whatever their number: layouts for fewer gain nothing
MOST = 2**28  # bytes of weights: a larger model stays in one copy
MATRICES = ("qkv", "out", "gate_up", "down")


@dataclass(frozen=True, eq=False)
class Copy:
    """A model's matrices in another layout, and the products with them."""

    layers: tuple[Layer, ...]
    head: Tensor
    times: Callable[[Tensor, Tensor], Tensor]  # (N, I) by an (I, O) matrix -> (N, O), of any strides
    plus_times: Callable[[Tensor, Tensor, Tensor], Tensor]  # as `torch.addmm`: an (O,) bias or (N, O) states first


def turned_copy(lm: LayeredLM) -> Copy | None:
    """For up to TURNED rows; None where there are none, or the model is too large, or not for this."""
    return _copy(lm, lambda matrix: matrix.t().contiguous(), _turned, _plus_turned) if TURNED and _fits(lm) else None


def packed_copy(lm: LayeredLM) -> Copy | None:
    """For PACKED rows and more; None where the model is too large, or not for this."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return _copy(lm, _pack, _packed, _plus_packed) if there and _fits(lm) else None


def _fits(lm: LayeredLM) -> bool:
    matrices = [lm.head, *(getattr(layer, name) for layer in lm.layers for name in MATRICES)]
    return (lm.device.type, lm.dtype) == ("cpu", torch.float32) and sum(m.nbytes for m in matrices) <= MOST


def _copy(lm: LayeredLM, lay_out: Callable[[Tensor], Tensor], times: Callable, plus_times: Callable) -> Copy:
    layers = (replace(layer, **{name: lay_out(getattr(layer, name)) for name in MATRICES}) for layer in lm.layers)
    return Copy(tuple(layers), lay_out(lm.head), times, plus_times)


def _turned(x: Tensor, matrix: Tensor) -> Tensor:
    several = torch.cat([x, x]) if len(x) == 1 else x
    return torch.mm(matrix, several.t()).t()[: len(x)]


def _plus_turned(addend: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    return addend + _turned(x, matrix)


def _pack(matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(matrix.t().contiguous(), LAID_OUT_FOR)


def _packed(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")


def _plus_packed(addend: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    if addend.dim() == 1:
        return torch.ops.mkldnn._linear_pointwise(x, matrix, addend, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, addend, matrix, None, "add")
