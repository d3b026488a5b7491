"""LayerSkip training (Elhoushi et al., 2024, sections 4.1 and 4.2) of the embedded model: one file, one run.

A Llama model is trained so that every layer can speak through the shared final norm and head:
layer dropout that grows exponentially with depth, and a loss at early exits, rotated over the layers.
Training on one GPU, on several (torchrun), or on the CPU for a look:

    python -m lede_env.models.layerskip corpus --out data --prose prose.txt.xz
    torchrun --nproc-per-node 4 -m lede_env.models.layerskip train --data data --out runs/tiny --minutes 25
    python -m lede_env.models.layerskip export --checkpoint runs/tiny/checkpoint.safetensors --data data --out tiny
    python -m lede_env.models.layerskip evaluate --model tiny --data data

Weights are a plain dict under their Hugging Face names; the forward is free functions over tensors.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lede_env.errors import LedeError
from lede_env.models import corpus, evaluation

EXIT_PERIOD = 4  # exit l is trained at the steps with l mod 4 == step mod 4
LOSS_ROWS = 8192  # positions whose logits exist at one time
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


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
    return weight.to(x.dtype) * h.to(x.dtype)


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
    """One decoder layer. x (B, T, C); weights in the order of LAYER_WEIGHTS; keep (B, 1, 1) of 0 and 1."""
    norm1, q, k, v, o, norm2, gate, up, down = (w.to(x.dtype) for w in weights)
    batch, length, _ = x.shape
    h = rms_norm(x, norm1)
    query, key, value = (  # (B, H, T, head_dim)
        F.linear(h, w).view(batch, length, -1, cos.shape[-1]).transpose(1, 2) for w in (q, k, v)
    )
    attended = F.scaled_dot_product_attention(
        rotate(query, cos, sin), rotate(key, cos, sin), value, is_causal=True
    )
    x = x + keep * F.linear(attended.transpose(1, 2).reshape(batch, length, -1), o)
    h = rms_norm(x, norm2)
    return x + keep * F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def layer_states(
    weights: dict[str, Tensor],
    tokens: Tensor,
    shape: Shape,
    keep: Tensor,
    run_layer: Callable[..., Tensor] = layer_forward,
) -> list[Tensor]:
    """The un-normed state (B, T, C) leaving each of the L layers, in keep's dtype.

    tokens (B, T) int64; keep (L, B, 1, 1): 0 where layer dropout skips the layer for that sequence.
    """
    x = F.embedding(tokens, weights["model.embed_tokens.weight"]).to(keep.dtype)
    cos, sin = rotary(tokens.shape[1], shape.hidden // shape.heads, x.device, x.dtype)
    states = []
    for i in range(shape.layers):
        own = [weights[f"model.layers.{i}.{name}.weight"] for name in LAYER_WEIGHTS]
        x = run_layer(x, own, cos, sin, keep[i])
        states.append(x)
    return states


def logits(weights: dict[str, Tensor], state: Tensor) -> Tensor:
    """(..., C) -> (..., V): the shared final norm and the tied head, which serve every exit."""
    head = weights["model.embed_tokens.weight"].to(state.dtype)
    return F.linear(rms_norm(state, weights["model.norm.weight"]), head)


# ---------------------------------------------------------------------------------------------- the objective


def dropout_rates(layers: int, maximum: float) -> Tensor:
    """(L,) probability of skipping each layer: maximum * (2^(l / (L - 1)) - 1), l = 0..L-1 (paper, section 4.1)."""
    return maximum * (2.0 ** (torch.arange(layers) / max(layers - 1, 1)) - 1)


def exit_layers(layers: int, step: int) -> list[int]:
    """The exits trained at this step, 1-based, the last layer always among them and at the end."""
    return [e for e in range(1, layers) if e % EXIT_PERIOD == step % EXIT_PERIOD] + [layers]


def exit_loss(
    states: Tensor, targets: Tensor, norm: Tensor, head: Tensor, scale: Tensor, distill: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a chunk of positions at every exit.

    states (E, N, C), the last layer last; targets (N,); scale (E,) weight of each exit.
    distill: exits learn the last layer's distribution (KL, detached), otherwise the next token.
    Returns the scaled sum over exits and positions, the unscaled sums (E,), and the last layer's correct count.
    """
    log_p = F.log_softmax(F.linear(rms_norm(states, norm), head.to(states.dtype)).float(), dim=-1)  # (E, N, V)
    last = log_p[-1]
    if distill:
        teacher = last.detach()
        early = (teacher.exp() * (teacher - log_p[:-1])).sum((1, 2))
    else:
        early = -log_p[:-1].gather(-1, targets.expand(len(states) - 1, -1)[..., None]).sum((1, 2))
    losses = torch.cat([early, F.nll_loss(last, targets, reduction="sum")[None]])
    return (losses * scale).sum(), losses.detach(), (last.argmax(-1) == targets).sum()


# ------------------------------------------------------------------------------------------------- training


@dataclass
class Train:
    """Train on the corpus in `data`; writes checkpoint, curves, exported model and evaluation to `out`."""

    data: Path
    out: Path
    minutes: float | None = None
    """budget by the clock of the whole run, compilation included; the step count is fixed after 70 steps"""
    steps: int | None = None
    """budget by steps, instead of minutes"""
    session_minutes: float | None = None
    """stop with a checkpoint after so long in this process, the schedule unchanged; go on with --resume"""
    resume: bool = False
    """continue from out/checkpoint.safetensors if it is there"""
    batch: int = 48
    """sequences a step on each GPU"""
    lr: float = 2e-3
    warmup: int = 200
    layer_dropout: float = 0.1
    exit_loss: Literal["distill", "cross-entropy"] = "distill"
    exit_weights: Literal["uniform", "early"] = "uniform"
    """early: layers 1 to 6 count twice"""
    last_weight: float = 1.5
    prose_fraction: float = 0.25
    """share of the training tokens that are prose"""
    checkpoint_seconds: float = 120.0
    evaluate: bool = True
    """evaluate the exported model at the end"""
    seed: int = 0
    shape: Annotated[Shape, tyro.conf.arg(name="")] = field(default_factory=Shape)


def learning_rate(step: int, total: int | None, args: Train) -> float:
    """Linear warm-up, constant to 30 % of the run, then linear to 2 % at its end."""
    done = step / total if total else 0.0
    return args.lr * min(1.0, (step + 1) / args.warmup) * min(1.0, 1 - 0.98 * (done - 0.3) / 0.7)


def exit_scale(exits: list[int], args: Train) -> list[float]:
    """The weight of each exit in the loss; they sum to 1."""
    scale = [2.0 if args.exit_weights == "early" and e <= 6 else 1.0 for e in exits[:-1]] + [args.last_weight]
    return [s / sum(scale) for s in scale]


def sample_windows(streams: dict[str, np.ndarray], args: Train, step: int, rank: int) -> Tensor:
    """(B, T + 1) random windows, a function of (seed, step, rank) alone, so that a resumed run sees the same."""
    rng = np.random.default_rng((args.seed, step, rank))
    windows = np.empty((args.batch, args.shape.context + 1), dtype=np.int64)
    for row in windows:
        wanted = "prose" if rng.random() < args.prose_fraction else "python"
        stream = streams.get(wanted, next(iter(streams.values())))
        start = rng.integers(len(stream) - args.shape.context)
        row[:] = stream[start : start + args.shape.context + 1]
    return torch.from_numpy(windows)


class Trainer:
    """Weights, optimizer and step count of one process; the processes of a run hold equal weights."""

    def __init__(self, args: Train, rank: int, world: int, device: torch.device) -> None:
        self.args, self.rank, self.world, self.device = args, rank, world, device
        self.cuda = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.weights = initial_weights(args.shape, args.seed, device)
        matrices = [w for w in self.weights.values() if w.ndim == 2]
        norms = [w for w in self.weights.values() if w.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
            lr=args.lr,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.run_layer = torch.compile(layer_forward, dynamic=False) if self.cuda else layer_forward
        self.run_loss = torch.compile(exit_loss, dynamic=False) if self.cuda else exit_loss
        self.rates = dropout_rates(args.shape.layers, args.layer_dropout).to(device)
        self.generator = torch.Generator(device)
        self.step = 0
        self.total: int | None = args.steps

    def backward(self, tokens: Tensor) -> tuple[list[int], Tensor, Tensor]:
        """Add this step's gradients for tokens (B, T + 1). Returns the exits, their losses (E,), the accuracy."""
        shape, args = self.args.shape, self.args
        self.generator.manual_seed((args.seed * 1_000_003 + self.step) * 4096 + self.rank)
        draws = torch.rand(shape.layers, len(tokens), generator=self.generator, device=self.device)
        keep = (draws >= self.rates[:, None]).to(self.dtype)[:, :, None, None]  # (L, B, 1, 1)
        states = layer_states(self.weights, tokens[:, :-1], shape, keep, self.run_layer)
        exits = exit_layers(shape.layers, self.step)
        stacked = torch.stack([states[e - 1] for e in exits]).flatten(1, 2)  # (E, N, C)
        targets = tokens[:, 1:].flatten()
        scale = torch.tensor(exit_scale(exits, args), device=self.device) / len(targets)
        losses, correct = torch.zeros_like(scale), torch.zeros((), device=self.device)
        gradients = []
        # Chunk by chunk back to the states, so that only one chunk's logits exist at a time.
        for chunk, target in zip(stacked.split(LOSS_ROWS, dim=1), targets.split(LOSS_ROWS), strict=True):
            leaf = chunk.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            norm, head = self.weights["model.norm.weight"], self.weights["model.embed_tokens.weight"]
            loss, sums, hits = self.run_loss(leaf, target, norm, head, scale, args.exit_loss == "distill")
            loss.backward()
            gradients.append(leaf.grad)
            losses, correct = losses + sums, correct + hits
        stacked.backward(torch.cat(gradients, dim=1))
        return exits, losses / len(targets), correct / len(targets)

    def average_gradients(self) -> None:
        gradients = [w.grad for w in self.weights.values()]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def train_step(self, streams: dict[str, np.ndarray]) -> tuple[list[int], Tensor, Tensor]:
        tokens = sample_windows(streams, self.args, self.step, self.rank)
        tokens = tokens.pin_memory().to(self.device, non_blocking=True) if self.cuda else tokens
        outcome = self.backward(tokens)
        if self.world > 1:
            self.average_gradients()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total, self.args)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return outcome

    def save(self, path: Path) -> None:
        """One safetensors file, replaced whole: weights, both moments, and the step as JSON in its header."""
        tensors = {name: w.detach() for name, w in self.weights.items()}
        for name, w in self.weights.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.optimizer.state[w][moment]
        header = {"step": self.step, "total": self.total, "shape": asdict(self.args.shape)}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"training": json.dumps(header)})
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Take up a checkpoint. Raises LedeError when it is unreadable or of another shape."""
        header, tensors = read_checkpoint(path)
        if Shape(**header["shape"]) != self.args.shape:
            raise LedeError(f"{path} holds {header['shape']}, asked for {self.args.shape}: use the same arguments")
        self.step, self.total = header["step"], header["total"]
        with torch.no_grad():
            for name, w in self.weights.items():
                w.copy_(tensors[name])
                moments = {m: tensors[f"{m}.{name}"].to(self.device) for m in ("exp_avg", "exp_avg_sq")}
                count = torch.tensor(float(self.step), device=self.device)
                self.optimizer.state[w] = {"step": count, **moments}


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header (step, total, shape) and tensors. Raises LedeError when the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["training"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own type, not exported in all versions
        raise LedeError(f"{path}: not a readable training checkpoint ({error})") from error
