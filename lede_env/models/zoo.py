"""The models of the suite: one row a model, with what the rest of the code needs to know before loading it."""

from __future__ import annotations

from dataclasses import dataclass

from lede_env.errors import LedeError


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
    context: int  # positions it was trained for
    rope_theta: float
    llama3_factor: float | None  # of Llama 3's RoPE scaling; None: no scaling
    tied: bool  # LM head = embedding
    candidate_layers: tuple[int, ...]  # ascending, within 1..n_layers-1: the embedded model's, at the same depths
    fingerprint: str | None = None  # of the weights that ship (`LayeredLM.fingerprint`); None: they do not

    @property
    def licence_page(self) -> str:
        """Where the licence can be read, and accepted where that is asked for."""
        if self.hub_id is None:
            return "https://www.apache.org/licenses/LICENSE-2.0"
        return f"https://huggingface.co/{self.hub_id}"


_FAIR = "FAIR Noncommercial Research License"

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("tiny", None, "Apache-2.0", 16, 256, 4, 4, 64, 768, 4096,
                  2048, 1e4, None, True, (3, 4, 6, 8), "fd3993149977f530"),
        ModelSpec("llama3.2-1b", "facebook/layerskip-llama3.2-1B", _FAIR, 16, 2048, 32, 8, 64, 8192, 128256,
                  131072, 5e5, 32.0, True, (3, 4, 6, 8)),
        ModelSpec("llama2-7b", "facebook/layerskip-llama2-7B", _FAIR, 32, 4096, 32, 32, 128, 11008, 32000,
                  4096, 1e4, None, False, (6, 8, 12, 16)),
        ModelSpec("llama2-13b", "facebook/layerskip-llama2-13B", _FAIR, 40, 5120, 40, 40, 128, 13824, 32000,
                  4096, 1e4, None, False, (8, 10, 15, 20)),
        ModelSpec("codellama-7b", "facebook/layerskip-codellama-7B", _FAIR, 32, 4096, 32, 32, 128, 11008, 32016,
                  16384, 1e6, None, False, (6, 8, 12, 16)),
        ModelSpec("codellama-34b", "facebook/layerskip-codellama-34B", _FAIR, 48, 8192, 64, 8, 128, 22016, 32000,
                  16384, 1e6, None, False, (9, 12, 18, 24)),
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


def twin_name(name: str) -> str:
    """What the geometry twin of a model is called, wherever a name stands."""
    return f"{name}-twin"


def find_twin(name: str) -> ModelSpec | None:
    """The row whose geometry twin has this name, in any case; None where there is none."""
    return next((spec for spec in MODELS.values() if spec.hub_id and twin_name(spec.name) == name.lower()), None)


def twin_spec(name: str) -> ModelSpec:
    """The row whose geometry twin is asked for by the model's name or the twin's; a LedeError where there is none."""
    spec = find_twin(name) or find_spec(name)
    if spec is None or spec.hub_id is None:
        others = ", ".join(spec.name for spec in MODELS.values() if spec.hub_id)
        raise LedeError(f"weights='twin' needs one of the paper's models ({others}), not {name!r}")
    return spec


def twin_layer(layer: int, donor_layers: int, n_layers: int) -> int:
    """Where the `layer`-th of a donor's layers sits in a twin `n_layers` deep: at the same share of the depth."""
    return -(-layer * n_layers // donor_layers)  # rounded up
