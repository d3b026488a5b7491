"""The wall-clock speedup of the leaderboard's best policies, decoding with the model.

Of each of the fastest agents by modelled speedup, and of the paper's, the run nearest its median decodes test prompts,
in turn with Autoregressive and the static setting that is best on the training prompts.

    python -m benchmarks.offline_rl_speed
"""

from __future__ import annotations

import csv
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

import lede_env
from benchmarks.harness import RESULTS, Player, machine, print_table, speedup_interval, time_methods, write_results
from benchmarks.offline_rl_runs import Run
from lede_env.arguments import clear_errors
from lede_env.errors import LedeError
from lede_env.tasks import fit_prompt

PAPERS = "n-step DQN (paper)"


@dataclass
class Args:
    """Time the best policies of a leaderboard."""

    results: Path = RESULTS / "offline_rl"  # with runs.csv; the table goes here too
    runs: Path = Path("runs/offline_rl")  # the policies
    best: int = 5  # agents timed, of each set of features; the paper's always is
    static: str = "3,6"  # exit layer and draft length of the best static setting (benchmarks/results/cpu/cpu_speed.md)
    prompts: int = 20  # test prompts, spread over the tasks
    max_new_tokens: int = 96
    repeats: int = 3


def main(args: Args) -> None:
    console = Console()
    lm = lede_env.load_model("tiny")
    layer, length = map(int, args.static.split(","))
    chosen = fastest(args)
    strategies: dict[str, Any] = {
        "Autoregressive": lede_env.Autoregressive(),
        f"best static ({args.static})": lede_env.LayerSkip(layer, length),
        **{name: lede_env.Lede(lede_env.load_policy(folder)) for name, (_, folder) in chosen.items()},
    }
    test = lede_env.load_prompts("all", "test")
    room = lm.geometry.context - args.max_new_tokens - 1
    prompts = [
        (index, fit_prompt(lm.encode(prompt.text), room, prompt.task)[0])
        for index, prompt in enumerate(test[:: max(1, len(test) // args.prompts)][: args.prompts])
    ]
    players = {name: Player(lm, strategy, args.max_new_tokens, 0.0, 0) for name, strategy in strategies.items()}
    timings = time_methods(players, prompts, args.repeats, console, synchronise=lm.device.type == "cuda")
    baseline, static = list(timings.values())[:2]
    rows = []
    for name, timing in timings.items():
        (ratio, low, high), counts = speedup_interval(baseline, timing), timing.counts
        drafts = counts.drafted > 0
        rows.append(
            {
                "method": name,
                "tokens/s": timing.tokens_per_second,
                "speedup": ratio,
                "95 % interval": f"{low:.2f} to {high:.2f}",
                "over best static": speedup_interval(static, timing)[0],
                "modelled speedup": chosen[name][0] if name in chosen else "",
                "E": counts.E if drafts else float("nan"),
                "d": counts.d if drafts else float("nan"),
                "acceptance": counts.acceptance if drafts else float("nan"),
            }
        )
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.offline_rl_speed", *sys.argv[1:]]),
        "decoding": f"embedded model, greedy, batch 1, {len(prompts)} test prompts x {args.max_new_tokens} tokens, "
        f"median of {args.repeats}; prefill included",
        **machine(lm.device.type),
    }
    write_results(args.results, "wall_clock", rows, about)
    print_table("wall-clock speedup of the leaderboard's best", rows, console)


def fastest(args: Args) -> dict[str, tuple[float, Path]]:
    """Row name -> modelled speedup and policy folder of the run nearest the median of the agent's runs.

    Raises:
        LedeError: there is no leaderboard, or its policies are not at hand.
    """
    file = args.results / "runs.csv"
    if not file.is_file():
        raise LedeError(f"{file} is missing; run python -m benchmarks.offline_rl first")
    groups: dict[tuple[str, str], list[tuple[float, Path]]] = {}
    with file.open(newline="") as table:
        for row in csv.DictReader(table):
            folder = Run.of_row(row).folder(args.runs) / "policy"
            if folder.is_dir():
                groups.setdefault((row["features"], row["agent"]), []).append((float(row["modelled_speedup"]), folder))
    if not groups:
        raise LedeError(
            f"no policies of {file} in {args.runs}; run python -m benchmarks.offline_rl on this machine first"
        )
    medians = {key: float(np.median([speedup for speedup, _ in runs])) for key, runs in groups.items()}
    chosen = {}
    for features in dict.fromkeys(features for features, _ in groups):
        own = sorted((key for key in groups if key[0] == features), key=lambda key: -medians[key])
        for key in [*own[: args.best], *(key for key in own[args.best :] if key[1] == PAPERS)]:
            chosen[f"{key[1]}, {features}"] = min(groups[key], key=lambda run, key=key: abs(run[0] - medians[key]))
    return chosen


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
