"""The engine on CUDA: Triton kernels, and for one sequence segments of the model captured as CUDA graphs."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch

if TYPE_CHECKING:
    from lede_env.engine.layered_lm import LayeredLM

CAPABILITY = (8, 0)  # of the oldest GPUs that Triton compiles for
_WARNED: WeakSet[LayeredLM] = WeakSet()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernels_fit(lm: LayeredLM) -> bool:
    """Whether the kernels can run this model; warns, once, where they cannot and it runs eagerly, several times slower.

    Head sizes must be a power of two of at least 16.
    """
    dim = lm.geometry.head_dim
    if lm.dtype not in DTYPES:
        reason = f"{lm.dtype} has no kernels; use bfloat16, float16 or float32"
    elif not _has_triton():
        reason = "the package triton is missing; install a CUDA build of torch"
    elif (capability := _capability(lm.device)) < CAPABILITY:
        has, needs = (".".join(map(str, version)) for version in (capability, CAPABILITY))
        reason = f"its GPU has compute capability {has}, and Triton's kernels need {needs}"
    elif lm.device.index not in (None, torch.cuda.current_device()):  # where kernels, streams and events go
        there = lm.device.index
        reason = f"it is on cuda:{there}, which is not the current device; call torch.cuda.set_device({there}) first"
    elif dim < 16 or dim & (dim - 1):
        reason = f"its heads have {dim} channels, which is no power of two from 16 on"
    else:
        return True
    if lm in _WARNED:
        return False
    _WARNED.add(lm)
    warnings.warn(f"model {lm.name!r} runs eagerly on CUDA, several times slower: {reason}", stacklevel=3)
    return False


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
