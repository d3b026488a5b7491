"""LayerSkip training (Elhoushi et al., 2024, sections 4.1 and 4.2) of the embedded model: one file, one run.

A Llama model is trained so that every layer can speak through the shared final norm and head:
layer dropout that grows exponentially with depth, and a loss at early exits, rotated over the layers.
Training on one GPU, on several (torchrun), or on the CPU for a look:

    python -m lede_env.models.layerskip corpus --out data
    torchrun --nproc-per-node 2 -m lede_env.models.layerskip train --data data --out run1 --minutes 10
    python -m lede_env.models.layerskip train --data data --out run2 --start-from run1/model --minutes 7
    python -m lede_env.models.layerskip evaluate --model run2/model --data data

The embedded model came from three such stages; tiny/MODEL_CARD.md has their commands and what each gave.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from lede_env.arguments import clear_errors
from lede_env.errors import LedeError
from lede_env.models import corpus, evaluation
from lede_env.models.layerskip_model import Shape, export
from lede_env.models.layerskip_trainer import Train, Trainer, read_checkpoint

CONTROL_STEPS = 10  # the processes agree on the clock every so many steps
LOG_SECONDS = 10.0
RATE_FROM, RATE_TO = 20, 70  # the speed that turns minutes into steps: from the one, known by the other
TINY = Path(__file__).with_name("tiny")
console = Console()


class Curves:
    """Rank 0's record: curves.jsonl, TensorBoard, and a progress bar or (not on a terminal) log lines."""

    def __init__(self, args: Train, world: int, now: float) -> None:
        self.tokens_a_step = args.batch * args.shape.context * world
        self.file = (args.out / "curves.jsonl").open("a")
        self.recent: list[tuple[list[int], Tensor, Tensor]] = []
        self.written = now
        columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("compiling", total=None)
        self.progress.start()
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(args.out)
        except ImportError:
            console.print("tensorboard is not installed: curves go to curves.jsonl alone")

    def write(self, trainer: Trainer, now: float) -> None:
        """Average what was gathered since the last call. now: seconds since the run began."""
        losses: dict[int, list[float]] = {}
        for exits, values, _ in self.recent:
            for layer, value in zip(exits, values.tolist(), strict=True):
                losses.setdefault(layer, []).append(value)
        means = {layer: float(np.mean(values)) for layer, values in sorted(losses.items())}
        scalars = {
            "loss": means[trainer.args.shape.layers],
            "accuracy": float(np.mean([float(a) for *_, a in self.recent])),
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
            "tokens_per_second": len(self.recent) * self.tokens_a_step / (now - self.written),
        }
        row = {"step": trainer.step, "total": trainer.total, "seconds": now, **scalars, "exit_loss": means}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board:
            for name, value in [*scalars.items(), *((f"exit_loss/{k}", v) for k, v in means.items())]:
                self.board.add_scalar(name, value, trainer.step)
        text = (
            f"step {trainer.step}/{trainer.total or '?'}  loss {scalars['loss']:.3f}  "
            f"accuracy {scalars['accuracy']:.3f}  {scalars['tokens_per_second']:,.0f} tokens/s"
        )
        self.progress.update(self.task, completed=trainer.step, total=trainer.total, description=text)
        if not console.is_terminal:
            console.print(f"{now:7.0f} s  {text}", highlight=False)
        self.recent, self.written = [], now

    def close(self) -> None:
        self.progress.stop()
        self.file.close()
        if self.board:
            self.board.close()


def agreed_seconds(trainer: Trainer, start: float) -> float:
    """Seconds since `start` by rank 0's clock, once the work queued so far is done."""
    if trainer.cuda:
        torch.cuda.synchronize(trainer.device)
    now = torch.tensor(time.monotonic() - start, dtype=torch.float64, device=trainer.device)
    if trainer.world > 1:
        dist.broadcast(now, src=0)
    return now.item()


def fit(trainer: Trainer, streams: dict[str, np.ndarray], start: float) -> bool:
    """Train to the end of the budget (True) or of the session (False), with checkpoints on the way."""
    args, first = trainer.args, trainer.step
    checkpoint = args.out / "checkpoint.safetensors"
    curves = Curves(args, trainer.world, time.monotonic() - start) if trainer.rank == 0 else None
    saved = rate_start = 0.0
    planning = trainer.total is None
    while trainer.total is None or trainer.step < trainer.total:
        outcome = trainer.train_step(streams)
        if curves:
            curves.recent.append(outcome)
        if trainer.step % CONTROL_STEPS and trainer.step != trainer.total:
            continue
        now = agreed_seconds(trainer, start)
        if trainer.step - first <= RATE_FROM:
            rate_start, rate_step = now, trainer.step
        elif args.minutes and planning and trainer.step - first >= RATE_TO:
            rate = (trainer.step - rate_step) / (now - rate_start)
            trainer.total = trainer.step + max(1, int(rate * (60 * args.minutes - now)))
            planning = now < 15 * args.minutes  # the learning rate is constant in the first quarter
        ended = trainer.step == trainer.total
        stop = bool(args.session_minutes and now > 60 * args.session_minutes)
        if curves and (now - curves.written > LOG_SECONDS or ended or stop):
            curves.write(trainer, now)
        if now - saved > args.checkpoint_seconds or ended or stop:
            saved = now
            if trainer.rank == 0:
                trainer.save(checkpoint)
        if stop:
            break
    if curves:
        curves.close()
    return trainer.step == trainer.total


def run_training(args: Train) -> None:
    start = time.monotonic()
    if (args.minutes is None) == (args.steps is None):
        raise LedeError("give the budget as either --minutes or --steps")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.out.mkdir(parents=True, exist_ok=True)
    if rank == 0:  # before CUDA is touched: the tokenising processes are forked
        prepare(args.data, args.shape.vocab)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        dist.barrier()
    streams = corpus.load_tokens(args.data)
    trainer = Trainer(args, rank, world, device)
    checkpoint = args.out / "checkpoint.safetensors"
    if args.resume and checkpoint.exists():
        trainer.load(checkpoint)
    if rank == 0:
        parameters = sum(w.numel() for w in trainer.weights.values()) / 1e6
        sizes = ", ".join(f"{len(s) / 1e6:.1f} M {d}" for d, s in streams.items())
        console.print(f"{parameters:.2f} M parameters, {world} x {device.type}, tokens: {sizes}", highlight=False)
    finished = fit(trainer, streams, start)
    if world > 1:
        dist.destroy_process_group()
    if rank == 0 and finished:
        export(trainer.weights, args.shape, args.data / "tokenizer.json", args.out / "model")
        if args.evaluate:
            results = evaluation.evaluate(args.out / "model", args.data, str(device))
            evaluation.report(results, args.out / "evaluation.json", console)


def prepare(data: Path, vocab: int) -> None:
    """Tokenizer and token streams, where `data` has none yet."""
    if not list(data.glob("*.train.txt.xz")):
        raise LedeError(f"{data}: no *.train.txt.xz; build it with the corpus command")
    if not (data / "tokenizer.json").exists():
        console.print("training the tokenizer")
        corpus.train_tokenizer(data, vocab)
    corpus.tokenise(data)


# ----------------------------------------------------------------------------------------------- command line


@dataclass
class Corpus:
    """Download the pinned wheels and write the training and the held-out text."""

    out: Path
    prose: Path | None = None
    """an .xz file of UTF-8 documents separated by NUL; without it the corpus is Python alone"""
    megabytes: float = 240.0
    """at most this much Python text is kept"""


@dataclass
class Export:
    """Write a checkpoint as a model folder for transformers."""

    checkpoint: Path
    data: Path
    """the folder of the training data, for its tokenizer"""
    out: Path = TINY


@dataclass
class Evaluate:
    """Measure agreement of every layer with the last one, held out and on the model's own text."""

    model: Path
    data: Path
    """a folder of the corpus command; only its *.heldout.txt.xz are read"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    windows: int = 64
    """held-out windows of each domain, one context long"""
    texts: int = 64
    """continuations generated in each domain and mode"""
    out: Path = Path("runs/evaluation.json")


def main() -> None:
    """Run the subcommand that the command line names."""
    args = tyro.extras.subcommand_cli_from_dict(
        {"corpus": Corpus, "train": Train, "export": Export, "evaluate": Evaluate}, description=__doc__
    )
    if isinstance(args, Corpus):
        files = corpus.build_corpus(args.out, args.prose, args.megabytes)["files"]
        console.print_json(data=files)
    elif isinstance(args, Train):
        run_training(args)
    elif isinstance(args, Export):
        header, tensors = read_checkpoint(args.checkpoint)
        weights = {name: t for name, t in tensors.items() if name.startswith("model.")}
        export(weights, Shape(**header["shape"]), args.data / "tokenizer.json", args.out)
    else:
        results = evaluation.evaluate(args.model, args.data, args.device, args.windows, args.texts)
        evaluation.report(results, args.out, console)


if __name__ == "__main__":
    with clear_errors():
        main()
