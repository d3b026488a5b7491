"""Small real models for the tests: randomly initialised checkpoints in Hugging Face form."""

from __future__ import annotations

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
    initializer_range=0.3,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# name -> (config class, model class, overrides)
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=4)),
    "llama-gqa": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=2)),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "llama3-rope": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=2, rope_parameters=LLAMA3_ROPE)),
    "llama-head-dim": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=2, head_dim=16)),
    "mistral": (MistralConfig, MistralForCausalLM, dict(num_key_value_heads=2, sliding_window=None)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict(num_key_value_heads=2)),
}


def save_random_model(folder, architecture="llama", *, late_scale=1.0, early=2, seed=0, **overrides):
    """Write a random model to `folder` and return it in float64.

    `late_scale` < 1 shrinks the output projections of the layers after `early`, so that drafts made there are often
    right: a purely random model rejects nearly all of them and never exercises acceptance.
    """
    config_class, model_class, own = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **own, **overrides})).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
        for layer in model.model.layers[early:]:
            layer.self_attn.o_proj.weight *= late_scale
            layer.mlp.down_proj.weight *= late_scale
    model.eval().save_pretrained(folder)
    return model
