"""The constants that our copy of the paper lost, swept one at a time around the defaults of `agents.nstep_dqn`.

Two tables. The agent's own (n, gamma, learning rate, sigma) are judged by the score on the exit MDP's validation
prompts, learned from logged data. Those of the problem (k and w of the signals, the reward's constants) change what a
score means, so they are judged by the modelled speedup of the policy on the draft MDP's validation prompts, learned
from random play; v0 of every id keeps its values whatever comes out here.

    python -m benchmarks.nstep_sweep
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from agents import nstep_dqn
from agents.task import BATCH
from benchmarks.harness import RESULTS, machine, print_table, write_results
from benchmarks.offline_rl_runs import Run, execute_all, pool
from lede_env.arguments import clear_errors
from lede_env.display.progress import progress_bar
from lede_env.engine import signals
from lede_env.envs import draft_trace
from lede_env.evaluation import evaluate
from lede_env.policies import RandomPolicy
from lede_env.recording import record

AGENT: dict[str, tuple[float, ...]] = {
    "n_step": (1, 2, 3, 5),
    "gamma": (0.9, 0.97, 0.99, 1.0),
    "learning_rate": (1e-4, 3e-4, 1e-3, 3e-3),
    "sigma": (0.1, 0.25, 0.5, 1.0),
}
PROBLEM: dict[str, tuple[float, ...]] = {
    "k": (1, 3, 5, 10),
    "w": (2, 4, 8, 16, 32),
    "depth": (0.0, 0.5, 1.0, 2.0, 4.0),
    "reject": (-0.5, -1.0, -2.0, -4.0),
    "continue_": (0.0, -0.02, -0.05, -0.1, -0.2),
}
V0 = {"k": signals.CONFIDENCE_K, "w": signals.TRACE_WINDOW, "depth": 1.0, "reject": -1.0, "continue_": -0.05}


@dataclass
class Args:
    """Sweep the constants."""

    datasets: tuple[str, ...] = ("tiny/medium-replay-v0", "tiny/random-v0")  # of the agent's constants
    features: str = "paper"  # what the policies observe
    episodes: int = 100  # of random play, for each of the problem's constants
    seeds: int = 2
    updates: int = 800  # of a training, in batches of 256: eight times as many of 32
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    runs: Path = Path("runs/nstep_sweep")  # finished runs of the agent's constants
    out: Path = RESULTS / "nstep_sweep"


def main(args: Args) -> None:
    console = Console()
    about = {"command": shlex.join(["python", "-m", "benchmarks.nstep_sweep", *sys.argv[1:]]), **machine()}
    agent = sweep_agent(args, console)
    write_results(args.out, "agent", agent, {"score": "validation, mean and standard error over seeds", **about})
    print_table("the agent's constants: score on validation", agent, console)
    problem = sweep_problem(args, console)
    write_results(args.out, "problem", problem, {"speedup": "modelled, validation, tiny-cpu; greedy texts", **about})
    print_table("the problem's constants: modelled speedup on validation", problem, console)
    console.print(f"written to {args.out}")


def sweep_agent(args: Args, console: Console) -> list[dict[str, Any]]:
    """A row a value of a constant, the others at their defaults."""
    trials = [(name, value) for name, values in AGENT.items() for value in values]
    runs = [
        Run("nstep", "agents.nstep_dqn:NStepDQN", {name: value}, dataset, args.features, seed, args.updates)
        for name, value in trials
        for dataset in args.datasets
        for seed in range(1, args.seeds + 1)
    ]
    with progress_bar(console) as bar:
        task = bar.add_task("the agent's constants", total=len(runs))
        results = execute_all(runs, args.runs, args.workers, lambda: bar.advance(task))
    scores = np.array([r["validation"]["normalised_score"] for r in results]).reshape(len(trials), -1, args.seeds)
    return [
        {"constant": constant, "value": f"{value:g}",
         "default": "yes" if value == getattr(nstep_dqn.Args, constant) else "", "mean": float(own.mean()),
         **{name: spread(row) for name, row in zip(args.datasets, own, strict=True)}}
        for (constant, value), own in zip(trials, scores, strict=True)
    ]  # fmt: skip


def sweep_problem(args: Args, console: Console) -> list[dict[str, Any]]:
    """A row a value of a constant, the others as v0 has them."""
    trials = [(name, value, {**V0, name: value}) for name, values in PROBLEM.items() for value in values]
    different = [dict(pairs) for pairs in dict.fromkeys(tuple(constants.items()) for _, _, constants in trials)]
    jobs = [(constants, seed, args) for constants in different for seed in range(1, args.seeds + 1)]
    with progress_bar(console) as bar, pool(args.workers) as processes:
        found = list(bar.track(processes.imap(speedup, jobs), len(jobs), description="the problem's constants"))
    speedups = np.array(found).reshape(len(different), args.seeds)
    return [
        {"constant": name, "value": f"{value:g}", "v0": "yes" if value == V0[name] else "",
         "speedup": spread(speedups[different.index(constants)], 3)}
        for name, value, constants in trials
    ]  # fmt: skip


def speedup(job: tuple[Mapping[str, Any], int, Args]) -> float:
    """Of the policy that the paper's agent learns where the problem has these constants."""
    constants, seed, args = job
    kwargs = {name: constants[name] for name in ("depth", "reject", "continue_")}
    with tempfile.TemporaryDirectory() as folder, signal_constants(int(constants["k"]), int(constants["w"])):
        log = Path(folder) / "random.h5"
        record("LEDE-Tiny-v0", RandomPolicy(), args.episodes, log, seed=seed, backend="trace", reward_kwargs=kwargs)
        updates = args.updates * BATCH // nstep_dqn.Args.batch_size
        shared: dict[str, Any] = dict(features=args.features, seed=seed, offline_updates=updates)
        policy = nstep_dqn.train(nstep_dqn.Args(offline=log, out=Path(folder), **shared)).policy
        return float(evaluate(policy, "LEDE-Tiny-Draft-v0", "validation").modelled_speedup or 0.0)


@contextmanager
def signal_constants(k: int, w: int) -> Iterator[None]:
    """Other k and w for as long as this lasts: a trace holds what any of them takes."""
    before = signals.FEATURES["confidence"], signals.TRACE_WINDOW
    signals.FEATURES["confidence"] = dict.fromkeys(range(k), -1 / k)
    signals.TRACE_WINDOW = draft_trace.TRACE_WINDOW = w
    try:
        yield
    finally:
        signals.FEATURES["confidence"], signals.TRACE_WINDOW = before
        draft_trace.TRACE_WINDOW = before[1]


def spread(values: np.ndarray, digits: int = 1) -> str:
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
