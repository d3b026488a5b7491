"""A model of the zoo's shape with random weights: for timing where the real ones cannot be had. It says nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from lede_env.engine.layered_lm import LayeredLM
from lede_env.errors import LedeError
from lede_env.models.assembly import Tensors, assemble, random_values
from lede_env.models.config import spec_config
from lede_env.models.loading import resolve_device, resolve_dtype
from lede_env.models.zoo import MODELS


class RandomTensors(Tensors):
    """Matrices drawn at random on the device, gains of one."""

    def get(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self.device, dtype=self.dtype)
        return random_values(name, shape, shape[1] ** -0.5, self.device, self.dtype)


def random_model(name: str, *, device: str = "auto", dtype: str | None = None, context: int = 4096) -> LayeredLM:
    """A `LayeredLM` of a zoo model's geometry, its matrices drawn at random on the device; `weights` is "random".

    Raises:
        LedeError: not a name of the zoo; a device or dtype that does not exist.
    """
    if name not in MODELS:
        raise LedeError(f"model {name!r} has no geometry here; random weights can be had for {', '.join(MODELS)}")
    spec, where = MODELS[name], resolve_device(device)
    return assemble(
        RandomTensors(spec_config(spec, context), where, resolve_dtype(dtype, where)),
        name=name,
        weights="random",
        fingerprint=f"random-{name}",
        candidate_layers=spec.candidate_layers,
        eos_ids=(),
        tokenizer=None,
    )
