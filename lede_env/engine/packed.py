"""Products of several rows on a CPU, by oneDNN, with matrices in a layout of its own.

MKL, behind `@`, lays a matrix out anew at every call; oneDNN does it once. For 30 rows of the embedded model that takes
a quarter off the time, and costs a second copy of the weights. With few rows MKL is the faster one on Intel's own
processors, by a third; on an AMD EPYC it takes twice as long as oneDNN for as few as two. There verification is packed
too, elsewhere prompts and batches are. The operators are those that `torch.compile` calls.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lede_env.engine.processor import processor_name

if TYPE_CHECKING:
    from lede_env.engine.layered_lm import LayeredLM

ROWS = 2 if processor_name().startswith("AMD ") else 16  # fewest that gain by it
LAID_OUT_FOR = 16  # rows, whatever their number: layouts for fewer gain nothing
MOST = 2**28  # bytes of weights: a larger model stays in one copy


def packed_copy(lm: LayeredLM) -> LayeredLM | None:
    """The model with its layers' matrices and its head packed; None where it is too large, or not for this."""
    names = ("qkv", "out", "gate_up", "down")
    matrices = [lm.head, *(getattr(layer, name) for layer in lm.layers for name in names)]
    fits = (lm.device.type, lm.dtype) == ("cpu", torch.float32) and sum(m.nbytes for m in matrices) <= MOST
    if not fits or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    layers = (replace(layer, **{name: _pack(getattr(layer, name)) for name in names}) for layer in lm.layers)
    return replace(lm, layers=tuple(layers), head=_pack(lm.head))


def _pack(matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(matrix.t().contiguous(), LAID_OUT_FOR)


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """(N, I) by a packed (I, O)."""
    return torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")


def plus_times(addend: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """As `torch.addmm`: an (O,) bias or (N, O) states, and the product."""
    if addend.dim() == 1:
        return torch.ops.mkldnn._linear_pointwise(x, matrix, addend, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, addend, matrix, None, "add")
