"""One process of LayerSkip training: its settings, one optimizer step, its checkpoint file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lede_env.errors import LedeError
from lede_env.models.layerskip_model import (
    EXIT_PERIOD,
    Shape,
    dropout_rates,
    exit_layers,
    exit_loss,
    initial_weights,
    layer_forward,
    layer_states,
)

LOSS_ROWS = 16384  # positions whose logits exist at one time


@dataclass
class Train:
    """Train on the corpus in `data`; writes checkpoint, curves, exported model and evaluation to `out`."""

    data: Path
    out: Path
    minutes: float | None = None
    """budget by the clock of the whole run, compilation included; fixes the step count in its first quarter"""
    steps: int | None = None
    """budget by steps, instead of minutes"""
    session_minutes: float | None = None
    """stop with a checkpoint after so long in this process, the schedule unchanged; go on with --resume"""
    resume: bool = False
    """continue from out/checkpoint.safetensors if it is there"""
    start_from: Path | None = None
    """begin with the weights of this exported model folder, with a fresh optimizer and schedule"""
    batch: int = 48
    """sequences a step on each GPU"""
    lr: float = 2e-3
    warmup: int = 200
    layer_dropout: float = 0.1
    exit_loss: Literal["distill", "cross-entropy"] = "distill"
    exit_weights: Literal["uniform", "early", "first-half"] = "uniform"
    """early: layers 1 to 6 count twice; first-half: layers 1 to L / 2 count four times"""
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
    last, favoured = {"uniform": (0, 1.0), "early": (6, 2.0), "first-half": (exits[-1] // 2, 4.0)}[args.exit_weights]
    scale = [favoured if e <= last else 1.0 for e in exits[:-1]] + [args.last_weight]
    return [s / sum(scale) for s in scale]


def sample_windows(streams: dict[str, np.ndarray], args: Train, step: int, rank: int) -> Tensor:
    """(B, T + 1) random windows: a function of (seed, step, rank), so that a resumed run sees the same."""
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
        if args.start_from:
            self.start_from(args.start_from)
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
        phases = [exit_layers(args.shape.layers, step) for step in range(EXIT_PERIOD)]
        self.scales = [torch.tensor(exit_scale(exits, args), device=device) for exits in phases]
        self.generator = torch.Generator(device)
        self.step = 0
        self.total: int | None = args.steps

    def backward(self, tokens: Tensor) -> tuple[list[int], Tensor, Tensor]:
        """Add the gradients for tokens (B, T + 1). Returns the exits, their losses (E,), the accuracy."""
        shape, args = self.args.shape, self.args
        self.generator.manual_seed((args.seed * 1_000_003 + self.step) * 4096 + self.rank)
        draws = torch.rand(shape.layers, len(tokens), generator=self.generator, device=self.device)
        keep = (draws >= self.rates[:, None]).to(self.dtype)[:, :, None, None]  # (L, B, 1, 1)
        states = layer_states(self.weights, tokens[:, :-1], shape, keep, self.run_layer)
        exits = exit_layers(shape.layers, self.step)
        stacked = torch.stack([states[e - 1] for e in exits]).flatten(1, 2)  # (E, N, C)
        targets = tokens[:, 1:].flatten()
        scale = self.scales[self.step % EXIT_PERIOD] / len(targets)
        losses, correct = torch.zeros_like(scale), torch.zeros((), device=self.device)
        gradients = []
        # Chunk by chunk back to the states, so that only one chunk's logits exist at a time.
        for chunk, target in zip(stacked.split(LOSS_ROWS, dim=1), targets.split(LOSS_ROWS), strict=True):
            leaf = chunk.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            norm, head = self.weights["model.norm.weight"], self.weights["model.embed_tokens.weight"]
            loss, sums, hits = self.run_loss(leaf, target, norm, head, scale, args.exit_loss == "distill", self.dtype)
            loss.backward()
            gradients.append(leaf.grad)
            losses, correct = losses + sums, correct + hits
        stacked.backward(torch.cat(gradients, dim=1))
        return exits, losses / len(targets), correct / len(targets)

    def average_gradients(self) -> None:
        gradients = [w.grad for w in self.weights.values() if w.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        means = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [m.view_as(g) for m, g in zip(means, gradients, strict=True)])

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

    def start_from(self, folder: Path) -> None:
        """Copy the weights of an exported model. Raises LedeError when it is unreadable or of another shape."""
        try:
            tensors = load_file(folder / "model.safetensors")
            with torch.no_grad():
                for name, w in self.weights.items():
                    w.copy_(tensors[name])
        except Exception as error:
            raise LedeError(f"{folder}: not an exported model of shape {self.args.shape} ({error})") from error

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
