"""Decoding speed on the CPU: our engine beside transformers, in one run (`make bench`).

Rows: transformers' greedy `generate`; the same with `assistant_early_exit`, at its defaults and at its best setting
of a sweep; then Autoregressive, the best static LayerSkip and LEDE of this project. Every method decodes the same
test prompts, in turn, after a warm-up; a figure is the median over repeats, summed over prompts.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from transformers import AutoModelForCausalLM

import lede_env
from benchmarks.demo import decoder
from benchmarks.harness import (
    RESULTS,
    Method,
    Timing,
    acceptance_table,
    machine,
    print_table,
    speedup_interval,
    time_methods,
    write_results,
)
from lede_env.engine.cost_model import measure
from lede_env.evaluation import best_static
from lede_env.models.loading import EMBEDDED
from lede_env.tasks import load_prompts


@dataclass
class Args:
    """Compare decoding speed with transformers on this CPU."""

    policy: str = "tiny"  # policy of LEDE: the shipped one, or a folder
    out: Path = RESULTS / "cpu"  # folder for cpu_speed.csv, .md and .json
    prompts: int = 24  # test prompts
    sweep_prompts: int = 5  # validation prompts of the assistant_early_exit sweep
    max_new_tokens: int = 96
    repeats: int = 3
    threads: int = 2


def main(args: Args) -> None:
    console = Console()
    torch.set_num_threads(args.threads)
    lm = lede_env.load_model("tiny", device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    validation = load_prompts("all", "validation")

    costs = measure("tiny", device="cpu")
    accepted = acceptance_table(lm, validation, args.max_new_tokens, range(1, lm.n_layers // 2 + 1), console)
    static, _ = best_static(accepted, costs)
    step = max(1, len(validation) // args.sweep_prompts)
    early = best_early_exit(args, reference, [lm.encode(p.text) for p in validation[::step]], console)

    test = load_prompts("all", "test")
    prompts = [lm.encode(p.text) for p in test[:: max(1, len(test) // args.prompts)][: args.prompts]]
    n = args.max_new_tokens
    methods = {
        "transformers": transformers_method(reference, n),
        "transformers, assistant_early_exit=4 (defaults)": transformers_method(reference, n, (4, 20, 0.4)),
        "transformers, assistant_early_exit={} best: {} tokens, threshold {}".format(*early): transformers_method(
            reference, n, early
        ),
        "Autoregressive": decoder(lm, lede_env.Autoregressive(), n),
        f"LayerSkip e={static.exit_layer} d={static.speculation}": decoder(
            lm, lede_env.LayerSkip(static.exit_layer, static.speculation), n
        ),
        "LEDE": decoder(lm, lede_env.Lede(lede_env.load_policy(args.policy)), n),
    }
    timings = time_methods(methods, prompts, args.repeats, console)
    rows = table(timings)
    print_table(f"greedy, embedded model, float32, batch 1, {args.threads} threads", rows, console)
    about = {
        "command": " ".join(["python -m benchmarks.cpu_speed", *sys.argv[1:]]),
        **machine(),
        **{k: str(v) for k, v in vars(args).items()},
    }
    different = differences(timings)
    write_results(args.out, "cpu_speed", rows, {**about, "texts unlike those of transformers": different})
    console.print(f"texts unlike those of transformers: {different}; written to {args.out}")


def transformers_method(model, max_new_tokens: int, early_exit: tuple[int, int, float] | None = None) -> Method:
    """transformers' greedy generate; early_exit: (exit layer, draft tokens, confidence threshold)."""

    def decode(prompt: list[int]):
        ids = torch.tensor([prompt])
        options = {}
        if early_exit is not None:
            layer, tokens, threshold = early_exit
            # Passed to generate() these two are ignored; on the generation config they count.
            model.generation_config.num_assistant_tokens = tokens
            model.generation_config.assistant_confidence_threshold = threshold
            options = {"assistant_early_exit": layer}
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, **options
            )
        return out[0, len(prompt) :].tolist(), None

    return decode


def best_early_exit(args: Args, model, prompts: list[list[int]], console: Console) -> tuple[int, int, float]:
    """The fastest assistant_early_exit setting on validation prompts."""
    grid = list(itertools.product((2, 3, 4, 6), (3, 5, 8), (0.0, 0.4, 0.6)))
    methods = {repr(setting): transformers_method(model, args.max_new_tokens // 2, setting) for setting in grid}
    timings = time_methods(methods, prompts, 1, console)
    return max(grid, key=lambda setting: timings[repr(setting)].tokens_per_second)


def table(timings: dict[str, Timing]) -> list[dict]:
    peers = list(timings)
    reference, best_peer = timings[peers[0]], max((timings[p] for p in peers[1:3]), key=lambda t: t.tokens_per_second)
    own, static = timings["Autoregressive"], timings[peers[4]]
    rows = []
    for name, timing in timings.items():
        against, low, high = speedup_interval(own, timing)
        counts = timing.counts
        nothing = float("nan")
        rows.append(
            {
                "method": name,
                "tokens/s": timing.tokens_per_second,
                "over transformers": speedup_interval(reference, timing)[0],
                "over best early exit": speedup_interval(best_peer, timing)[0],
                "over Autoregressive": against,
                "95 % interval": f"{low:.2f} to {high:.2f}",
                "over LayerSkip": speedup_interval(static, timing)[0],
                "E": counts.E if counts.drafted else nothing,
                "d": counts.d if counts.drafted else nothing,
                "acceptance": counts.acceptance if counts.drafted else nothing,
                "repeated 8-grams": timing.repeated,
            }
        )
    return rows


def differences(timings: dict[str, Timing]) -> int:
    expected = next(iter(timings.values())).tokens
    return sum(timing.tokens[i] != expected[i] for timing in timings.values() for i in expected)


if __name__ == "__main__":
    main(tyro.cli(Args))
