"""The models of the suite: one row a model, with what the rest of the code needs to know before loading it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """Geometry, source and candidate exit layers of one model (paper section 4.1)."""

    name: str
    hub_id: str | None  # None: ships inside the package
    licence: str
    n_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    candidate_layers: tuple[int, ...]  # ascending, within 1..n_layers-1


_LLAMA2 = "Llama 2 Community License (https://ai.meta.com/llama/license)"
_FAIR = "FAIR Noncommercial Research License (see the model page)"

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("tiny", None, "Apache-2.0", 16, 256, 4, 4, 64, 768, 4096, (3, 4, 6, 8)),
        ModelSpec("llama3.2-1b", "facebook/layerskip-llama3.2-1B", _FAIR, 16, 2048, 32, 8, 64, 8192, 128256,
                  (2, 3, 4, 6, 8)),
        ModelSpec("llama2-7b", "facebook/layerskip-llama2-7B", _LLAMA2, 32, 4096, 32, 32, 128, 11008, 32000,
                  (4, 6, 8, 12, 16)),
        ModelSpec("llama2-13b", "facebook/layerskip-llama2-13B", _LLAMA2, 40, 5120, 40, 40, 128, 13824, 32000,
                  (5, 8, 10, 15, 20)),
        ModelSpec("codellama-7b", "facebook/layerskip-codellama-7B", _LLAMA2, 32, 4096, 32, 32, 128, 11008,
                  32016, (4, 6, 8, 12, 16)),
        ModelSpec("codellama-34b", "facebook/layerskip-codellama-34B", _LLAMA2, 48, 8192, 64, 8, 128, 22016,
                  32000, (6, 9, 12, 18, 24)),
    )
}  # fmt: skip


def find_spec(name: str) -> ModelSpec | None:
    """The row for a zoo name or a hub id, in any case; None when neither."""
    key = name.lower()
    if key in MODELS:
        return MODELS[key]
    return next((spec for spec in MODELS.values() if spec.hub_id and spec.hub_id.lower() == key), None)


def default_candidates(n_layers: int) -> tuple[int, ...]:
    """Candidate exits of a model the zoo does not list: an eighth to a half of its depth."""
    shares = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
    return tuple(sorted({min(max(1, round(share * n_layers)), n_layers - 1) for share in shares}))
