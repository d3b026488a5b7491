"""Decoding speed on the CPU: our engine beside transformers, in one run (`make bench`).

Greedy and at T = 0.6: transformers' `generate`; the same with `assistant_early_exit`, at its defaults and at its best
setting; then Autoregressive, the best static LayerSkip and LEDE of this project. Both sweeps score every setting on
validation prompts and time the best few of them again. Every method decodes the same test prompts, in turn, after a
warm-up; a figure is the median over repeats, summed over prompts.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from transformers import AutoModelForCausalLM

import lede_env
from benchmarks.engine_peers import transformers_method
from benchmarks.harness import (
    RESULTS,
    Method,
    Timing,
    machine,
    print_table,
    speedup_interval,
    time_methods,
    write_results,
)
from benchmarks.tuning import MACHINE, Bench, best, search, setting
from lede_env.arguments import clear_errors
from lede_env.cost_measurement import measure
from lede_env.models.loading import EMBEDDED
from lede_env.tasks import Prompt, load_prompts

DEFAULTS = (4, 20, 0.4)  # transformers' draft length and threshold, at a usual layer
GRID = tuple(itertools.product((2, 3, 4, 6), (3, 5, 8), (0.0, 0.4, 0.6)))  # layer, draft length, threshold


@dataclass
class Args:
    """Compare decoding speed with transformers on this CPU."""

    policies: tuple[str, ...] = ("tiny", "tiny-head")  # of LEDE: the shipped ones, or folders
    out: Path = RESULTS / "cpu"  # folder for cpu_speed.csv, .md and .json
    temperatures: tuple[float, ...] = (0.0, 0.6)
    prompts: int = 24  # test prompts
    validation_prompts: int = 8  # for the sweeps
    finalists: int = 3  # settings of each sweep that are timed again
    max_new_tokens: int = 96
    repeats: int = 3
    threads: int = 2
    seed: int = 0  # of sampling


def main(args: Args) -> None:
    console = Console()
    torch.set_num_threads(args.threads)
    reference = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    validation = spread(load_prompts("all", "validation"), args.validation_prompts)
    test = spread(load_prompts("all", "test"), args.prompts)
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {"command": " ".join(["python -m benchmarks.cpu_speed", *sys.argv[1:]]), **machine()}
    about |= {name: str(value) for name, value in vars(args).items() if name != "out"}
    for temperature in args.temperatures:
        found, sweeps = compare(args, temperature, reference, validation, test, console)
        rows += found
        about |= {f"{name}, T = {temperature}": value for name, value in sweeps.items()}
        print_table(f"T = {temperature}, embedded model, float32, batch 1, {args.threads} threads", found, console)
        write_results(args.out, "cpu_speed", rows, about)
    console.print(f"written to {args.out}")


def spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """So many prompts, evenly over the list and so over its tasks."""
    return prompts[:: max(1, len(prompts) // count)][:count]


def compare(
    args: Args, temperature: float, reference, validation: list[Prompt], test: list[Prompt], console: Console
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one temperature, and what the sweeps found."""
    lm = lede_env.load_model("tiny", device="cpu")
    costs = {MACHINE: measure("tiny", device="cpu")}
    bench = Bench(lm, None, args.max_new_tokens, temperature, args.seed, costs, console)
    early, early_grid = best_early_exit(args, temperature, reference, bench.tokens(validation)[0], console)
    trials = search(bench, ["layerskip"], validation, args.finalists, args.repeats)["layerskip"]
    static = best(trials, MACHINE)
    peer = {
        "transformers": None,
        f"transformers, assistant_early_exit={DEFAULTS[0]} (defaults)": DEFAULTS,
        "transformers, assistant_early_exit={}, best: {} tokens, threshold {}".format(*early): early,
    }
    methods: dict[str, Method] = {
        name: transformers_method(reference, args.max_new_tokens, setting, temperature, args.seed)
        for name, setting in peer.items()
    }
    own = {
        "Autoregressive": lede_env.Autoregressive(),
        f"LayerSkip {setting(static)}": static,
        **{f"LEDE {name}": lede_env.Lede(lede_env.load_policy(name)) for name in args.policies},
    }
    methods |= {name: bench.player(strategy) for name, strategy in own.items()}
    timings = time_methods(methods, bench.tokens(test)[0], args.repeats, console)
    sweeps = {
        "assistant_early_exit (layer, tokens, threshold): tokens/s": early_grid,
        "LayerSkip: modelled speedup, tokens/s of the finalists": {
            setting(trial.strategy): [round(trial.modelled[MACHINE], 3), trial.tokens_per_second] for trial in trials
        },
    }
    if temperature == 0.0:
        sweeps["texts unlike those of transformers"] = differences(timings)
    return [{"T": temperature, **row} for row in table(timings)], sweeps


def best_early_exit(
    args: Args, temperature: float, model, prompts: list[tuple[int, list[int]]], console: Console
) -> tuple[tuple[int, int, float], dict[str, list[float]]]:
    """The fastest assistant_early_exit setting, all timed once and the best few again, and every timing's tokens/s."""

    def timed(settings, prompts, repeats) -> dict[tuple[int, int, float], float]:
        methods: dict[str, Method] = {
            str(s): transformers_method(model, args.max_new_tokens, s, temperature, args.seed) for s in settings
        }
        timings = time_methods(methods, prompts, repeats, console)
        return {s: timings[str(s)].tokens_per_second for s in settings}

    first = timed(GRID, prompts[::3], 1)
    again = timed(sorted(first, key=lambda s: -first[s])[: args.finalists], prompts, args.repeats)
    grid = {str(s): [round(rate, 1), *([round(again[s], 1)] if s in again else [])] for s, rate in first.items()}
    return max(again, key=lambda s: again[s]), grid


def table(timings: dict[str, Timing]) -> list[dict[str, Any]]:
    peers = list(timings)
    best_peer = max(peers[1:3], key=lambda name: timings[name].tokens_per_second)
    bases = {
        "over transformers": peers[0], "over best early exit": best_peer,
        "over Autoregressive": peers[3], "over LayerSkip": peers[4],
    }  # fmt: skip
    rows = []
    for name, timing in timings.items():
        row: dict[str, Any] = {"method": name, "tokens/s": timing.tokens_per_second}
        for column, base in bases.items():
            row[column], low, high = speedup_interval(timings[base], timing)
            row[f"{column}, 95 %"] = f"{low:.2f} to {high:.2f}"
        counts, drafts = timing.counts, timing.counts.drafted > 0
        row |= {metric: getattr(counts, metric) if drafts else float("nan") for metric in ("E", "d", "acceptance")}
        rows.append({**row, "repeated 8-grams": timing.repeated})
    return rows


def differences(timings: dict[str, Timing]) -> int:
    expected = next(iter(timings.values())).tokens
    return sum(timing.tokens[i] != expected[i] for timing in timings.values() for i in expected)


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
