"""The offline-RL leaderboard: agents x datasets x seeds, scored exactly on all test prompts.

    python -m benchmarks.offline_rl                            # all of it; finished runs are kept, call it again
    python -m benchmarks.offline_rl --agent my_module:MyAgent  # and yours (agents/README.md)
    python -m benchmarks.offline_rl --check                    # a short version, held against the committed intervals

Settings are chosen by the score on the validation prompts, with a seed of their own, for each agent, dataset and set
of features; the policy that training ends with is scored, not the best on the way. Agents that learn from the trace or
by playing need no dataset, and run once a seed.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from benchmarks.harness import RESULTS, machine, print_table, write_csv, write_results
from benchmarks.offline_rl_figure import draw
from benchmarks.offline_rl_runs import Run, execute_all, find_agent, setting_text
from benchmarks.rl_statistics import bootstrap, iqm
from lede_env.arguments import clear_errors
from lede_env.display.progress import progress_bar
from lede_env.engine.signals import select_features
from lede_env.errors import LedeError
from lede_env.evaluation import paired_bootstrap

AGENTS = {
    "best fixed layer": "agents.bars:Fixed",
    "thresholds": "agents.bars:Thresholds",
    "logistic regression": "agents.bars:Logistic",
    "cloned oracle": "agents.bars:OracleCloning",
    "n-step DQN (paper)": "agents.nstep_dqn:NStepDQN",
    "acceptance stopping (ours)": "agents.acceptance_stopping:AcceptanceStopping",
    "optimal stopping (shipped)": "agents.bars:Shipped",
    "DQN": "agents.d3rlpy_offline:DQN",
    "double DQN": "agents.d3rlpy_offline:DoubleDQN",
    "quantile DQN": "agents.d3rlpy_offline:QuantileDQN",
    "NFQ": "agents.d3rlpy_offline:NFQ",
    "CQL": "agents.d3rlpy_offline:CQL",
    "BCQ": "agents.d3rlpy_offline:BCQ",
    "SAC": "agents.d3rlpy_offline:SAC",
    "BC": "agents.d3rlpy_offline:BC",
    "decision transformer": "agents.decision_transformer:DecisionTransformer",
    "SB3 DQN": "agents.sb3_online:DQN",
    "SB3 QR-DQN": "agents.sb3_online:QRDQN",
    "SB3 PPO": "agents.sb3_online:PPO",
}
CHECKED = ("thresholds", "logistic regression", "n-step DQN (paper)")  # in the short version
CHECKED_DATASET, CHECKED_FEATURES = "tiny/mixed-v0", "extended"
BAR = "thresholds"  # what every agent is compared with, prompt by prompt
TUNING_SEED = 1000  # apart from the seeds that are reported
ROUNDING = 0.1  # of a score: what another machine's rounding may make of a seed


@dataclass
class Args:
    """Train and score every agent on every dataset."""

    datasets: tuple[str, ...] = ("tiny/mixed-v0", "tiny/medium-replay-v0", "tiny/random-v0", "tiny/expert-v0")
    paper_datasets: tuple[str, ...] = ("tiny/mixed-v0", "tiny/medium-replay-v0")  # learned from with paper features
    features: tuple[str, ...] = ("paper", "extended")  # what the policies may observe
    agents: tuple[str, ...] = tuple(AGENTS)  # rows
    agent: tuple[str, ...] = ()  # more rows: module:Class each
    seeds: int = 5
    updates: int = 1000  # gradient steps of a training, batches of 256
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)  # processes, a thread each
    runs: Path = Path("runs/offline_rl")  # every run's result, policy and TensorBoard files
    out: Path = RESULTS / "offline_rl"  # folder of the tables and the figure
    check: bool = False  # few agents, one dataset, no tuning; fails unless all scores lie in the intervals of `out`

    def __post_init__(self) -> None:
        for name in ("seeds", "updates", "workers"):
            if getattr(self, name) < 1:
                raise LedeError(f"{name}={getattr(self, name)}; expected at least 1")
        unknown = [name for name in self.agents if name not in AGENTS]
        if unknown:
            raise LedeError(f"agent {unknown[0]!r} is unknown; there are {', '.join(AGENTS)}, or --agent module:Class")


@dataclass(frozen=True)
class Entry:
    """A row of the leaderboard on one dataset: an agent, what it may observe, and the settings it chooses from."""

    agent: str
    source: str
    learns_from: str
    grid: tuple[dict[str, Any], ...]
    dataset: str
    features: str

    @property
    def deterministic(self) -> bool:
        """Whether all seeds are one."""
        return getattr(find_agent(self.source), "deterministic", False)

    def run(self, settings: dict[str, Any], seed: int, updates: int) -> Run:
        return Run(self.agent, self.source, settings, self.dataset, self.features, seed, updates)


def main(args: Args) -> None:
    console = Console()
    if args.check:
        check(args, console)
        return
    entries = list(entries_of(args))
    results = play(args, entries, choose(args, entries, console), console)
    rows = leaderboard(entries, results)
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.offline_rl", *sys.argv[1:]]),
        "seeds": args.seeds,
        "updates of batch 256": args.updates,
        "scores": "on the exit MDP's test prompts; 0: random play, 100: the clairvoyant optimum",
        "IQM": "interquartile mean over datasets and seeds; low, high: its 95 % stratified bootstrap interval",
        "over thresholds": "mean score of all runs less that of thresholds; paired over test prompts, 95 % bootstrap",
        "speedup": "modelled, of the same policy on the draft MDP's test prompts, cost model tiny-cpu; mean over runs",
        "learns from": "data: the dataset; trace: the outcomes of all decisions on the training prompts; play: itself",
        **machine(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_results(args.out, "leaderboard", rows, about)
    write_csv(args.out / "runs.csv", run_rows(results))
    scores = {key: scores_of(found) for key, found in grouped(entries, results).items()}
    draw(rows, scores, args.out / "leaderboard.png")
    for features in args.features:
        shown = ("agent", "learns from", "IQM", "low", "high", "modelled speedup")
        own = [{name: row[name] for name in shown} for row in rows if row["features"] == features]
        print_table(f"{features} features", own, console)
    console.print(f"written to {args.out}: leaderboard.csv, .md, .json and .png, runs.csv")


def entries_of(args: Args) -> Iterable[Entry]:
    """What is to be trained; agents that need no dataset once, on the first one's environment."""
    sources = {name: AGENTS[name] for name in args.agents} | {source: source for source in args.agent}
    for features in args.features:
        datasets = args.paper_datasets if features == "paper" else args.datasets
        for name, source in sources.items():
            found = find_agent(source)
            if not set(getattr(found, "needs", ())) <= set(select_features(features, "exit")):
                continue
            for dataset in datasets if found.learns_from == "data" else datasets[:1]:
                yield Entry(name, source, found.learns_from, tuple(found.grid), dataset, features)


def choose(args: Args, entries: Sequence[Entry], console: Console) -> list[dict[str, Any]]:
    """The settings of each entry with the highest score on the validation prompts."""
    choices = [(index, entry.grid) for index, entry in enumerate(entries) if len(entry.grid) > 1]
    trials = [(index, settings) for index, grid in choices for settings in grid]
    runs = [entries[index].run(settings, TUNING_SEED, args.updates) for index, settings in trials]
    chosen, best = [entry.grid[0] for entry in entries], [-np.inf] * len(entries)
    for (index, settings), result in zip(trials, execute(args, runs, "choosing settings", console), strict=True):
        score = result["validation"]["normalised_score"]
        if score > best[index]:
            best[index], chosen[index] = score, settings
    return chosen


def play(
    args: Args, entries: Sequence[Entry], chosen: Sequence[dict[str, Any]], console: Console
) -> list[list[dict[str, Any]]]:
    """The results of every entry, a list of one a seed."""
    seeds = [range(1, 2 if entry.deterministic else args.seeds + 1) for entry in entries]
    runs = [
        entry.run(settings, seed, args.updates)
        for entry, settings, own in zip(entries, chosen, seeds, strict=True)
        for seed in own
    ]
    results = iter(execute(args, runs, "training", console))
    return [[next(results) for _ in own] for own in seeds]


def execute(args: Args, runs: Sequence[Run], what: str, console: Console) -> list[dict[str, Any]]:
    with progress_bar(console) as bar:
        task = bar.add_task(what, total=len(runs))
        return execute_all(runs, args.runs, args.workers, lambda: bar.advance(task))


def grouped(
    entries: Sequence[Entry], results: Sequence[list[dict[str, Any]]]
) -> dict[tuple[str, str], dict[str, list[dict[str, Any]]]]:
    """(features, agent) -> dataset -> the results of its seeds."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for entry, found in zip(entries, results, strict=True):
        dataset = entry.dataset if entry.learns_from == "data" else entry.learns_from
        groups.setdefault((entry.features, entry.agent), {})[dataset] = found
    return groups


def scores_of(found: dict[str, list[dict[str, Any]]]) -> np.ndarray:
    """(D, S) normalised scores on the test prompts; NaN where the agent is of another MDP."""
    return np.array([[r.get("test", {}).get("normalised_score", np.nan) for r in runs] for runs in found.values()])


def leaderboard(entries: Sequence[Entry], results: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row an agent and set of features, the best first."""
    learns = {entry.agent: entry.learns_from for entry in entries}
    groups = grouped(entries, results)
    bars = {
        features: [run for each in found.values() for run in each]
        for (features, agent), found in groups.items()
        if agent == BAR
    }
    rows = []
    for (features, agent), found in groups.items():
        scores = scores_of(found)
        low, high = bootstrap(scores)
        row: dict[str, Any] = {"features": features, "agent": agent, "learns from": learns[agent]}
        row |= {"IQM": float(iqm(scores)), "low": float(low), "high": float(high)}
        for entry in entries:
            if entry.learns_from == "data":
                row.setdefault(entry.dataset, "")
        for dataset, own in zip(found, scores, strict=True):
            if learns[agent] == "data":
                row[dataset] = interval_text(own[None])
        runs = [run for each in found.values() for run in each]
        speedups = [run["modelled_speedup"] for run in runs if run.get("modelled_speedup") is not None]
        row["over thresholds"] = lead(runs, bars[features]) if agent != BAR and bars.get(features) else ""
        row["modelled speedup"] = float(np.mean(speedups)) if speedups else float("nan")
        row["seconds a run"] = float(np.mean([run["seconds"] for run in runs]))
        row["settings"] = " ".join(dict.fromkeys(settings_text(run["run"]["settings"]) for run in runs))
        rows.append(row)
    return sorted(rows, key=lambda row: (row["features"], -np.nan_to_num(row["IQM"], nan=-np.inf)))


def lead(runs: Sequence[dict[str, Any]], bar: Sequence[dict[str, Any]]) -> str:
    """How far the mean of some runs is ahead of that of others, prompt by prompt, and what other prompts might say."""
    tables = [[run["prompts"] for run in own if "prompts" in run] for own in (runs, bar)]
    if len({len(scores) for table in tables for scores in table}) != 1 or not all(tables):
        return ""  # of another MDP, or on other prompts
    ahead = paired_bootstrap(*(np.mean(table, axis=0) for table in tables))
    return f"{ahead.mean:+.1f} ({ahead.low:+.1f} to {ahead.high:+.1f})"


def interval_text(scores: np.ndarray) -> str:
    low, high = bootstrap(scores)
    return f"{iqm(scores):.1f} ({low:.1f} to {high:.1f})"


def settings_text(settings: dict[str, Any]) -> str:
    return ",".join(f"{name}={setting_text(value)}" for name, value in settings.items())


def run_rows(results: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every run as a row of runs.csv."""
    return [
        {
            **{name: run["run"][name] for name in ("agent", "source", "dataset", "features", "seed", "updates")},
            "settings": json.dumps(run["run"]["settings"]),
            **run.get("test", {}),
            "validation_score": run.get("validation", {}).get("normalised_score"),
            "modelled_speedup": run.get("modelled_speedup"),
            "seconds": run["seconds"],
        }
        for runs in results
        for run in runs
    ]


def check(args: Args, console: Console) -> None:
    """The short version: train some of the committed runs again, by their settings and seeds, and compare.

    Raises:
        LedeError: an agent has no committed runs, or its score lies outside their interval.
    """
    with (args.out / "runs.csv").open(newline="") as file:
        committed = [row for row in csv.DictReader(file) if _is_checked(row)]
    runs = [Run.of_row(row) for row in committed]
    missing = set(CHECKED) - {run.agent for run in runs}
    if missing:
        raise LedeError(f"{args.out / 'runs.csv'} has no runs of {', '.join(missing)}; run the whole leaderboard first")
    with tempfile.TemporaryDirectory() as folder:
        results = execute(replace(args, runs=Path(folder)), runs, "training again", console)
    rows = []
    for agent in CHECKED:
        mine = [index for index, run in enumerate(runs) if run.agent == agent]
        old = np.array([[float(committed[index]["normalised_score"]) for index in mine]])
        new = np.array([[results[index]["test"]["normalised_score"] for index in mine]])
        low, high = bootstrap(old)
        inside = bool(low - ROUNDING <= iqm(new) <= high + ROUNDING)
        row = {"agent": agent, "runs": len(mine), "IQM": float(iqm(new)), "low": float(low), "high": float(high)}
        rows.append(row | {"inside": "yes" if inside else "no"})
    print_table(f"{CHECKED_DATASET}, {CHECKED_FEATURES} features, and the committed intervals", rows, console)
    outside = [row["agent"] for row in rows if row["inside"] == "no"]
    if outside:
        raise LedeError(f"outside the committed interval: {', '.join(outside)}; run the whole leaderboard again")


def _is_checked(row: dict[str, str]) -> bool:
    needs_data = find_agent(row["source"]).learns_from == "data"
    same = row["features"] == CHECKED_FEATURES and (row["dataset"] == CHECKED_DATASET or not needs_data)
    return row["agent"] in CHECKED and same


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
