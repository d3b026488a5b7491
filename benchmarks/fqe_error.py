"""How far off-policy evaluation is from the truth: FQE's estimate beside the exact value, per dataset.

python -m benchmarks.fqe_error
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from agents.fqe import GAMMA, exact_value, fitted_value
from agents.task import Task
from benchmarks.harness import RESULTS, machine, print_table, write_results
from benchmarks.offline_rl_runs import environment_of, find_agent, load, pool
from lede_env.arguments import clear_errors
from lede_env.display.progress import progress_bar
from lede_env.engine.signals import select_features


@dataclass
class Args:
    """Train policies, evaluate them by FQE on the data they were trained on, and exactly on the trace."""

    datasets: tuple[str, ...] = ("tiny/mixed-v0", "tiny/medium-replay-v0", "tiny/random-v0", "tiny/expert-v0")
    agents: tuple[str, ...] = ("DQN", "BC")  # classes of agents.d3rlpy_offline
    features: str = "extended"
    seeds: int = 2
    updates: int = 400  # of a training, batches of 256
    fqe_updates: int = 600
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    out: Path = RESULTS / "offline_rl"


def main(args: Args) -> None:
    console = Console()
    cells = [(dataset, agent) for dataset in args.datasets for agent in args.agents]
    jobs = [(args, dataset, agent, seed) for dataset, agent in cells for seed in range(1, args.seeds + 1)]
    with progress_bar(console) as bar, pool(args.workers) as processes:
        found = list(bar.track(processes.imap(estimate_and_truth, jobs), len(jobs), description="evaluating"))
    values = np.array(found).reshape(len(cells), args.seeds, 2)
    rows: list[dict[str, Any]] = []
    for (dataset, agent), (estimates, truths) in zip(cells, values.transpose(0, 2, 1), strict=True):
        errors = estimates - truths
        rows.append(
            {
                "dataset": dataset,
                "policy": agent,
                "FQE": float(estimates.mean()),
                "exact": float(truths.mean()),
                "error": float(errors.mean()),
                "absolute error": float(np.abs(errors).mean()),
                "largest": float(np.abs(errors).max()),
            }
        )
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.fqe_error", *sys.argv[1:]]),
        "values": f"discounted return of a token, gamma {GAMMA}, from the first states of the logged tokens",
        "means": f"over {args.seeds} seeds, each its own policy",
        "updates of batch 256": f"{args.updates} of the policy, {args.fqe_updates} of FQE",
        **machine(),
    }
    write_results(args.out, "fqe_error", rows, about)
    print_table("fitted Q evaluation against the exact value", rows, console)


def estimate_and_truth(job: tuple[Args, str, str, int]) -> tuple[float, float]:
    args, dataset_name, name, seed = job
    dataset = load(dataset_name)
    features = select_features(args.features, dataset.attributes["mdp"])
    task = Task(dataset, *environment_of(dataset.attributes), features, seed, args.updates)
    agent = find_agent(f"agents.d3rlpy_offline:{name}")()
    policy = agent.train(task)
    return fitted_value(agent, task, args.fqe_updates), exact_value(policy, task)


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
