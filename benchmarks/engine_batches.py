"""Tokens/s by context and batch: plain decoding, the best static LayerSkip, and LEDE with exits row by row; greedy.

One sequence runs on CUDA graphs, a batch in lockstep on fused layers, launched one by one. A context counts the new
tokens, which come last. A twin's donor was trained on 2048 positions: beyond them the figures are for timing alone, and
how many drafts are accepted there says nothing of a model trained that far. Results are written after every figure.

    python -m benchmarks.engine_batches --model llama2-7b
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

import lede_env
from benchmarks.engine_roofline import filler
from benchmarks.harness import machine, print_table, results_folder, write_results
from lede_env.arguments import clear_errors
from lede_env.decoding.generate import Generation
from lede_env.decoding.strategies import Autoregressive, Lede, Strategy, parse_strategy
from lede_env.display.progress import progress_bar
from lede_env.engine.layered_lm import LayeredLM
from lede_env.errors import LedeError

WARM_UP = 8  # new tokens of a batch's warm-up; one sequence decodes all of them, for its graphs


@dataclass
class Args:
    """Time decoding at every context and batch size."""

    model: str = "llama2-7b"
    weights: Literal["auto", "twin"] = "twin"
    policy: str | None = None  # of LEDE: a folder, or a shipped one; by default the model's
    static: tuple[str, ...] = ("layerskip:6,4", "layerskip:6,8", "layerskip:6,11")  # the fastest is taken, by batch
    contexts: tuple[int, ...] = (512, 2048, 4096)
    batches: tuple[int, ...] = (1, 4, 16)
    max_new_tokens: int = 64
    repeats: int = 2
    device: str = "auto"
    out: Path | None = None  # folder of the results; by default benchmarks/results/DEVICE

    def __post_init__(self) -> None:
        for name in ("batches", "max_new_tokens", "repeats"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise LedeError(f"{name}={value}; expected at least 1")
        if min(self.contexts) <= self.max_new_tokens:
            raise LedeError(f"contexts={self.contexts} must each be longer than max_new_tokens={self.max_new_tokens}")


def main(args: Args) -> list[dict[str, Any]]:
    """Time, write and print. Returns the rows."""
    console = Console()
    lm = lede_env.load_model(args.model, weights=args.weights, device=args.device)
    if max(args.contexts) > lm.geometry.context:
        raise LedeError(f"contexts={args.contexts}: the context of {lm.name} is {lm.geometry.context} tokens")
    lede = Lede(lede_env.load_policy(args.policy) if args.policy else None)
    candidates = [parse_strategy(name) for name in args.static]
    about = {**machine(lm.device.type), **{name: str(value) for name, value in vars(args).items() if name != "out"}}
    rows: list[dict[str, Any]] = []
    for strategy in (Autoregressive(), candidates[0]):  # the longest first: on graphs its session has room for all
        decode(lm, prompts(lm, 1, max(args.contexts) - args.max_new_tokens), strategy, args.max_new_tokens)
    with progress_bar(console) as bar:
        task = bar.add_task("context by batch", total=3 * len(args.batches) * len(args.contexts))
        for batch in args.batches:
            static = best_static(args, lm, candidates, batch)
            for context in sorted(args.contexts):
                texts = prompts(lm, batch, context - args.max_new_tokens)
                for strategy in (Autoregressive(), static, lede):
                    rows.append(figure(args, lm, texts, strategy))
                    write_results(args.out or results_folder(lm.device.type), f"engine_batches-{lm.name}", rows, about)
                    console.print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), highlight=False)
                    bar.advance(task)
    print_table(f"{lm.name}, {lm.dtype}, greedy", rows, console)
    return rows


def prompts(lm: LayeredLM, batch: int, length: int) -> list[list[int]]:
    """A batch of prompts of one length, each from another place of the texts at hand, which may come round again."""
    ids = filler(lm, batch * length)
    return [[ids[(row * length + place) % len(ids)] for place in range(length)] for row in range(batch)]


def decode(lm: LayeredLM, texts: list[list[int]], strategy: Strategy, max_new_tokens: int) -> list[Generation]:
    """The generations of a batch; one prompt goes alone, for it may run on graphs."""
    prompt = texts if len(texts) > 1 else texts[0]
    outs = lede_env.generate(lm, prompt, strategy=strategy, max_new_tokens=max_new_tokens)
    return outs if isinstance(outs, list) else [outs]


def best_static(args: Args, lm: LayeredLM, candidates: list[Strategy], batch: int) -> Strategy:
    """The fastest at the shortest context, half of the new tokens."""
    texts, count = prompts(lm, batch, min(args.contexts) - args.max_new_tokens), -(-args.max_new_tokens // 2)

    def rate(strategy: Strategy) -> float:
        decode(lm, texts, strategy, WARM_UP if batch > 1 else count)
        return tokens_per_second(decode(lm, texts, strategy, count))

    return max(candidates, key=rate)


def tokens_per_second(outs: list[Generation]) -> float:
    """Of a whole batch, prefill apart."""
    return sum(len(out.token_ids) for out in outs) / outs[0].metrics.decode_seconds


def figure(args: Args, lm: LayeredLM, texts: list[list[int]], strategy: Strategy) -> dict[str, Any]:
    """The row of a strategy at a context and batch: the median over repeats, after a warm-up.

    GPU memory is the most that was reserved for this row, the model and idle sessions included.
    """
    if lm.device.type == "cuda":  # what rows before it took is not this one's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    decode(lm, texts, strategy, min(WARM_UP, args.max_new_tokens) if len(texts) > 1 else args.max_new_tokens)
    runs = [decode(lm, texts, strategy, args.max_new_tokens) for _ in range(args.repeats)]
    counts = [out.counts for out in runs[0]]
    return {
        "batch": len(texts),
        "context": len(texts[0]) + args.max_new_tokens,
        "strategy": repr(strategy) if strategy.name == "layerskip" else strategy.name,
        "tokens/s": statistics.median(map(tokens_per_second, runs)),
        "tokens": sum(len(out.token_ids) for out in runs[0]),
        "tokens a round": sum(c.emitted for c in counts) / sum(c.rounds for c in counts),
        "prefill, s": statistics.median(outs[0].metrics.prefill_seconds for outs in runs),
        "GPU memory, GiB": torch.cuda.max_memory_reserved() / 2**30 if lm.device.type == "cuda" else float("nan"),
    }


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
