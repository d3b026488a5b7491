"""The model that LayerSkip training works on: a Llama as a dict of tensors, its exits and their loss.

Weights carry their Hugging Face names; the forward is free functions over explicit tensors, which compile
as they are. Shapes: B sequences, T tokens, C hidden, L layers, V vocabulary, E exits, N = B * T positions.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lede_env.errors import LedeError
from lede_env.models.corpus import END_OF_TEXT

EXIT_PERIOD = 4  # exit l is trained at the steps with l mod 4 == step mod 4
RESIDUAL = ("self_attn.o_proj", "mlp.down_proj")
LAYER_WEIGHTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' + message['content'] + '\\n' + eos_token }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The architecture: a Llama with as many key-value heads as heads, and tied embeddings."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 16
    heads: int = 4
    mlp: int = 768
    context: int = 2048

    def config(self) -> dict[str, Any]:
        """config.json of transformers' LlamaForCausalLM."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "dtype": "bfloat16",
        }


# ------------------------------------------------------------------------------------------------- the model


def initial_weights(shape: Shape, seed: int, device: torch.device) -> dict[str, Tensor]:
    """float32 leaves by Hugging Face name: normal(0, 0.02), residual outputs 0.02 / sqrt(2 L), norms 1."""
    generator = torch.Generator().manual_seed(seed)
    d, m = shape.hidden, shape.mlp
    sizes = {"mlp.gate_proj": (m, d), "mlp.up_proj": (m, d), "mlp.down_proj": (d, m)}
    weights = {"model.embed_tokens.weight": torch.randn(shape.vocab, d, generator=generator) * 0.02}
    for i in range(shape.layers):
        for name in LAYER_WEIGHTS:
            std = 0.02 / math.sqrt(2 * shape.layers) if name in RESIDUAL else 0.02
            size = sizes.get(name, (d, d))
            weight = torch.ones(d) if "norm" in name else torch.randn(size, generator=generator) * std
            weights[f"model.layers.{i}.{name}.weight"] = weight
    weights["model.norm.weight"] = torch.ones(d)
    return {name: w.to(device).requires_grad_() for name, w in weights.items()}


def rms_norm(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 states -> normed states in the dtype of the matrix products."""
    h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    return (weight * h).to(dtype)


def rotary(length: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin (T, head_dim) for theta 10000, halves repeated (the `rotate_half` convention)."""
    inverse = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.arange(length, device=device).float()[:, None] * inverse  # (T, head_dim / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def layer_forward(x: Tensor, weights: list[Tensor], cos: Tensor, sin: Tensor, keep: Tensor) -> Tensor:
    """One decoder layer. x (B, T, C) float32; weights in the order of LAYER_WEIGHTS; keep (B, 1, 1) of 0 and 1.

    The residual stream stays float32; keep's dtype is that of the matrix products.
    """
    norm1, norm2 = weights[0], weights[5]
    q, k, v, o, gate, up, down = (w.to(keep.dtype) for w in (*weights[1:5], *weights[6:]))
    batch, length, _ = x.shape
    h = rms_norm(x, norm1, keep.dtype)
    query, key, value = (  # (B, H, T, head_dim)
        F.linear(h, w).view(batch, length, -1, cos.shape[-1]).transpose(1, 2) for w in (q, k, v)
    )
    attended = F.scaled_dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value, is_causal=True)
    x = x + keep * F.linear(attended.transpose(1, 2).reshape(batch, length, -1), o)
    h = rms_norm(x, norm2, keep.dtype)
    return x + keep * F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def layer_states(
    weights: dict[str, Tensor],
    tokens: Tensor,
    shape: Shape,
    keep: Tensor,
    run_layer: Callable[..., Tensor] = layer_forward,
) -> list[Tensor]:
    """The un-normed float32 state (B, T, C) leaving each of the L layers.

    tokens (B, T) int64; keep (L, B, 1, 1): 0 where layer dropout skips the layer for that sequence.
    """
    x = F.embedding(tokens, weights["model.embed_tokens.weight"])
    cos, sin = rotary(tokens.shape[1], shape.hidden // shape.heads, x.device, keep.dtype)
    states = []
    for i in range(shape.layers):
        own = [weights[f"model.layers.{i}.{name}.weight"] for name in LAYER_WEIGHTS]
        x = run_layer(x, own, cos, sin, keep[i])
        states.append(x)
    return states


def logits(weights: dict[str, Tensor], state: Tensor) -> Tensor:
    """(..., C) -> (..., V): the shared final norm and the tied head, which serve every exit."""
    head = weights["model.embed_tokens.weight"]
    return F.linear(rms_norm(state, weights["model.norm.weight"], head.dtype), head)


# ---------------------------------------------------------------------------------------------- the objective


def dropout_rates(layers: int, maximum: float) -> Tensor:
    """(L,) chance of skipping layer l = 0..L-1: maximum * (2^(l / (L - 1)) - 1) (paper, section 4.1)."""
    return maximum * (2.0 ** (torch.arange(layers) / max(layers - 1, 1)) - 1)


def exit_layers(layers: int, step: int) -> list[int]:
    """The exits trained at this step, 1-based, the last layer always among them and at the end."""
    return [e for e in range(1, layers) if e % EXIT_PERIOD == step % EXIT_PERIOD] + [layers]


def exit_loss(
    states: Tensor, targets: Tensor, norm: Tensor, head: Tensor, scale: Tensor, distill: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a chunk of positions at every exit.

    states (E, N, C), the last layer last; targets (N,); scale (E,) weight of each exit.
    distill: exits learn the last layer's distribution (KL, detached), otherwise the next token.
    Returns the scaled sum over exits and positions, the unscaled sums (E,), the last layer's correct count.
    """
    log_p = F.log_softmax(F.linear(rms_norm(states, norm, dtype), head.to(dtype)).float(), dim=-1)  # (E, N, V)
    last = log_p[-1]
    if distill:
        teacher = last.detach()
        early = (teacher.exp() * (teacher - log_p[:-1])).sum((1, 2))
    else:
        early = -log_p[:-1].gather(-1, targets.expand(len(states) - 1, -1)[..., None]).sum((1, 2))
    losses = torch.cat([early, F.nll_loss(last, targets, reduction="sum")[None]])
    return (losses * scale).sum(), losses.detach(), (last.argmax(-1) == targets).sum()


# ------------------------------------------------------------------------------------------------- the export


def export(weights: dict[str, Tensor], shape: Shape, tokenizer_file: Path, out: Path) -> None:
    """Write a folder that transformers loads: config, bfloat16 weights, tokenizer with chat template."""
    if not tokenizer_file.exists():
        raise LedeError(f"{tokenizer_file}: no such file; expected the tokenizer of the training data")
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in weights.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    shutil.copyfile(tokenizer_file, out / "tokenizer.json")
    special = {f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "pad")}
    files = {
        "config.json": shape.config(),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "model_max_length": shape.context,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
