"""A model of the zoo's shape with random weights: for timing where the real ones cannot be had. It says nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from lede_env.engine.layered_lm import Geometry, Layer, LayeredLM
from lede_env.errors import LedeError
from lede_env.models.loading import ROPE_MARGIN, resolve_device, resolve_dtype
from lede_env.models.zoo import MODELS


def random_model(name: str, *, device: str = "auto", dtype: str | None = None, context: int = 4096) -> LayeredLM:
    """A `LayeredLM` of a zoo model's geometry, its matrices drawn at random on the device; `weights` is "random".

    Raises:
        LedeError: not a name of the zoo; a device or dtype that does not exist.
    """
    if name not in MODELS:
        raise LedeError(f"model {name!r} has no geometry here; random weights can be had for {', '.join(MODELS)}")
    spec, where = MODELS[name], resolve_device(device)
    kind = resolve_dtype(dtype, where)
    context = min(context, spec.context)
    geometry = Geometry(
        spec.n_layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.mlp, spec.vocab, context
    )
    generator = torch.Generator(where).manual_seed(0)

    def matrix(inputs: int, outputs: int) -> Tensor:
        weights = torch.empty(outputs, inputs, device=where, dtype=kind).normal_(0, inputs**-0.5, generator=generator)
        return weights.t().contiguous() if where.type == "cpu" else weights.t()  # the layouts that loading gives

    def layer() -> Layer:
        ones = torch.ones(spec.hidden, device=where, dtype=kind)
        queries = spec.heads * spec.head_dim
        fused = queries + 2 * spec.kv_heads * spec.head_dim
        return Layer(ones, matrix(spec.hidden, fused), None, matrix(queries, spec.hidden), ones,
                     matrix(spec.hidden, 2 * spec.mlp), matrix(spec.mlp, spec.hidden))  # fmt: skip

    pairs = torch.arange(0, spec.head_dim, 2, dtype=torch.float) / spec.head_dim
    angles = torch.arange(context + ROPE_MARGIN).unsqueeze(1) / spec.rope_theta**pairs
    wide = torch.float64 if kind == torch.float64 else torch.float32
    return LayeredLM(
        name=name,
        weights="random",
        fingerprint=f"random-{name}",
        geometry=geometry,
        candidate_layers=spec.candidate_layers,
        eos_ids=(),
        tokenizer=None,
        device=where,
        dtype=kind,
        embedding=matrix(spec.hidden, spec.vocab).t(),
        layers=tuple(layer() for _ in range(spec.n_layers)),
        final_norm=torch.ones(spec.hidden, device=where, dtype=kind),
        head=matrix(spec.hidden, spec.vocab),
        norm_eps=torch.tensor(1e-5, device=where, dtype=wide),
        rope=torch.polar(torch.ones_like(angles), angles).to(
            where, torch.complex128 if wide == torch.float64 else None
        ),
    )
