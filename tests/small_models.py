"""Small models and policies for the tests: random checkpoints in Hugging Face form, and one that follows a script."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lede_env.engine.layered_lm import Geometry, Layer
from lede_env.engine.signals import DRAFT_FEATURES
from lede_env.policies import MLPPolicy

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


def scripted_model(donor, ids, wrong=()):
    """A 4-layer model with the donor's tokenizer whose greedy text after `ids[0]` is `ids[1:]`, then `ids` again.

    Layers 1 and 2 agree with the full depth except at the indices of `ids` in `wrong`, which they draft wrongly; so
    a test can lay out every round by hand. How: layers pass the residual on, the head maps each token's embedding to
    its successor, and layer 3 adds a constant channel that vetoes the wrong drafts.
    """
    assert len(set(ids)) == len(ids), "each token has one successor: no token may come twice"
    hidden, dim, vocab = 64, donor.geometry.head_dim, donor.geometry.vocab
    generator = torch.Generator().manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(vocab, hidden, generator=generator, dtype=torch.float64))
    embedding[:, 0] = 0.0  # the veto's channel
    head = torch.zeros(hidden, vocab, dtype=torch.float64)
    spare = iter(token for token in range(vocab) if token not in ids)
    for index, (token, successor) in enumerate(pairwise([*ids, ids[0]]), 1):
        head[:, successor] += embedding[token]
        if index in wrong:
            draft = next(spare)
            head[:, draft] += 2.0 * embedding[token]
            head[0, draft] = -10.0
    layers = []
    for number in range(1, 5):
        out = torch.zeros(dim, hidden, dtype=torch.float64)
        out[0, 0] = float(number == 3)
        layers.append(
            Layer(
                attention_norm=torch.ones(hidden, dtype=torch.float64),
                qkv=torch.zeros(hidden, 3 * dim, dtype=torch.float64),
                qkv_bias=torch.ones(3 * dim, dtype=torch.float64),
                out=out,
                mlp_norm=torch.ones(hidden, dtype=torch.float64),
                gate_up=torch.zeros(hidden, 2, dtype=torch.float64),
                down=torch.zeros(1, hidden, dtype=torch.float64),
            )
        )
    return replace(
        donor,
        name="scripted",
        weights="checkpoint",
        geometry=Geometry(4, hidden, 1, 1, dim, 1, vocab, donor.geometry.context),
        candidate_layers=(1, 2, 3),
        eos_ids=(),
        dtype=torch.float64,
        embedding=embedding,
        layers=tuple(layers),
        final_norm=torch.ones(hidden, dtype=torch.float64),
        head=head,
        norm_eps=donor.norm_eps.double(),
        rope=donor.rope.to(torch.complex128),
    )


class CoinPolicy:
    """Exits by the toss of a seeded coin, so that exit layers and draft lengths vary within a text."""

    features = ("confidence", "trace")

    def __init__(self, seed=0, p=0.5):
        self.rng, self.p = np.random.default_rng(seed), p

    def __repr__(self) -> str:  # test ids come from it, and must be the same in every process
        return "CoinPolicy"

    def exit_probability(self, observations):
        return (self.rng.random(len(observations)) < self.p).astype(float)


def untrained_policy(lm, seed=0, **changes):
    """An MLP policy with random weights, made for `lm`; `changes` falsify what its card says."""
    policy = MLPPolicy.random(DRAFT_FEATURES, hidden=(16,), seed=seed)
    card = dict(
        mdp="draft",
        candidate_layers=lm.candidate_layers,
        n_layers=lm.n_layers,
        model_fingerprint=lm.fingerprint,
        model_name=lm.name,
    )
    return replace(policy, **{**card, **changes})
