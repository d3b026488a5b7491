"""The config.json of a checkpoint: read, refused unless our forward computes that very model, and condensed."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lede_env.engine.layered_lm import Geometry
from lede_env.errors import LedeError
from lede_env.models.zoo import ModelSpec

FAMILIES = ("llama", "mistral", "qwen2")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_SETTINGS = (
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON or UTF-8
        raise LedeError(f"{path} is not valid JSON ({error}); download the model again") from error
    if not isinstance(content, dict):
        raise LedeError(f"{path} does not hold a JSON object; download the model again")
    return content


def read_config(folder: Path) -> Any:
    """The transformers config of a folder, refused unless our forward computes exactly that model."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise LedeError(f"{folder} has no config.json; give a folder in Hugging Face form")
    kind = read_json(path).get("model_type")
    if kind not in FAMILIES:
        raise LedeError(f"{path} has model_type={kind!r}; supported architectures: {', '.join(FAMILIES)}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the validators of transformers raise a dozen types
        reason = " ".join(str(error).split())
        raise LedeError(f"transformers refuses {path} ({reason}); correct it or download the model again") from error
    rope = config.rope_parameters["rope_type"]
    partial = config.rope_parameters.get("partial_rotary_factor")
    refused = {
        f"sliding_window={getattr(config, 'sliding_window', None)}": kind == "mistral"
        and config.sliding_window is not None,
        "use_sliding_window=true": kind == "qwen2" and config.use_sliding_window,
        f"hidden_act={config.hidden_act!r}": config.hidden_act != "silu",
        "attention_bias=true": getattr(config, "attention_bias", False),
        "mlp_bias=true": getattr(config, "mlp_bias", False),
        "a quantization_config": getattr(config, "quantization_config", None) is not None,
        f"rope_type={rope!r}": rope not in ROPE_TYPES,
        f"partial_rotary_factor={partial!r}": partial not in (None, 1.0),
    }
    for setting, is_refused in refused.items():
        if is_refused:
            raise LedeError(
                f"{path} has {setting}, which is not supported; supported: full attention, SiLU, no biases but "
                f"Qwen2's own, unquantised weights, rope_type one of {', '.join(ROPE_TYPES)}; use another checkpoint"
            )
    _check_numbers(path, config)
    return config


def _check_numbers(path: Path, config: Any) -> None:
    """Refuse numbers that transformers lets through but no model can have."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    context, rope = config.max_position_embeddings, config.rope_parameters
    checks: list[tuple[str, Any, bool, str]] = [
        ("num_hidden_layers", config.num_hidden_layers, config.num_hidden_layers >= 2, "at least 2"),
        ("num_key_value_heads", kv_heads, kv_heads > 0 and heads % kv_heads == 0, f"a divisor of {heads} heads"),
        ("max_position_embeddings", context, context >= 2, "at least 2"),
        ("rms_norm_eps", config.rms_norm_eps, 0 <= config.rms_norm_eps < math.inf, "a small positive number"),
    ]
    for name in ROPE_SETTINGS:
        if (value := rope.get(name)) is not None:
            checks.append((name, value, isinstance(value, int | float) and 0 <= value < math.inf, "a number from 0 up"))
    for name in ("rope_theta", "factor"):  # these divide
        if name in rope:
            checks.append((name, rope[name], bool(rope[name]), "a positive number"))
    for setting, value, is_sound, expected in checks:
        if not is_sound:
            raise LedeError(f"{path} has {setting}={value!r}, expected {expected}; correct it or download it again")


def geometry_of(config: Any) -> Geometry:
    return Geometry(
        n_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        mlp=config.intermediate_size,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
    )


def tensor_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint by its name, layer by layer."""
    geometry = geometry_of(config)
    hidden, mlp = geometry.hidden, geometry.mlp
    queries, keys = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    }
    if config.model_type == "qwen2":
        layer |= {f"self_attn.{part}_proj.bias": layer[f"self_attn.{part}_proj.weight"][:1] for part in "qkv"}
    numbers = range(geometry.n_layers)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (geometry.vocab, hidden)}
    shapes |= {f"model.layers.{number}.{name}": shape for number in numbers for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (geometry.vocab, hidden)
    return shapes


def spec_config(spec: ModelSpec, context: int, **changes: Any) -> Any:
    """The transformers config of a row of the zoo, at a context of at most `context`; without RoPE scaling."""
    from transformers import LlamaConfig

    settings = dict(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.mlp,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=min(context, spec.context),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        tie_word_embeddings=spec.tied,
        architectures=["LlamaForCausalLM"],
    )
    return LlamaConfig(**{**settings, **changes})


def settings_of(config: Any, geometry: Geometry, eos_ids: tuple[int, ...]) -> dict[str, Any]:
    """What config.json adds to the tensors in defining the function: the rest of a fingerprint."""
    rope = config.rope_parameters
    scaling = {name: float(rope[name]) for name in ROPE_SETTINGS if rope.get(name) is not None}
    return {
        "architecture": config.model_type,
        "geometry": asdict(geometry),
        "activation": config.hidden_act,
        "norm_eps": float(config.rms_norm_eps),
        "tied": bool(config.tie_word_embeddings),
        "rope": {"type": rope["rope_type"], **scaling},
        "eos_ids": sorted(set(eos_ids)),
    }


def read_eos_ids(folder: Path, config: Any) -> tuple[int, ...]:
    """EOS ids of generation_config.json, else of config.json; warns of processors this decoder does not apply."""
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    neutral: dict[str, float | None] = {
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "min_length": 0,
        "min_new_tokens": 0,
        "num_beams": 1,
        "guidance_scale": 1.0,
        "bad_words_ids": None,
        "suppress_tokens": None,
        "sequence_bias": None,
    }
    active = [name for name, off in neutral.items() if settings.get(name) not in (None, off)]
    if active:
        warnings.warn(f"{path} asks for {', '.join(active)}, which this decoder does not apply", stacklevel=4)
    eos = settings.get("eos_token_id", config.eos_token_id)
    ids = eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    if any(type(token) is not int for token in ids):
        raise LedeError(f"{path} has eos_token_id={eos!r}, expected a token id or a list of them; correct it")
    return tuple(ids)
