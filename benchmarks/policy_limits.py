"""How much of what could be gained policies gain: modelled speedup on the draft MDP's test prompts, embedded model.

    best static setting | policies | trees with full information, on the same and on all features | the clairvoyant

All are exact, by the trace (lede_env/oracles.py). The static setting is the one that turns out best on these very
prompts, so that nobody could have chosen better for all tasks alike; beside it stands the one that the paper's tables
compare with, chosen on the validation prompts, task by task. By the CPU's costs, and by those of a 7B model on a GPU,
whose twin plays the same trace with the layers renamed: another price of a head, a verification and a decision, the
same text. A decision is whatever the cost model says it is; `decisions free` is the same play without that charge.
A policy that gives up bonus tokens is played so, as the decoder does on a CPU, and once more without; the clairvoyant
and the trees never do.

    python -m benchmarks.policy_limits
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from rich.console import Console

from agents.reference_trees import fit_reference
from benchmarks.harness import RESULTS, machine, print_table, ratio_interval, write_results
from lede_env.arguments import clear_errors
from lede_env.display.progress import progress_bar
from lede_env.engine.cost_model import CostModel, load_cost_model
from lede_env.envs.draft_mdp import DraftMDP
from lede_env.evaluation import best_static, static_result
from lede_env.oracles import DraftTable, Totals, tabulate
from lede_env.policies import ExitPolicy, TrainedPolicy, load_policy
from lede_env.registration import extended_for, pinned
from lede_env.tasks import TASKS

TUNED = "static tuned by task"  # on the validation prompts
ENV_IDS = ("LEDE-Tiny-Draft-v0", "LEDE-Llama2-7B-Twin-Draft-v0")


@dataclass
class Args:
    """Score policies between the best static setting and the clairvoyant optimum."""

    policies: tuple[str, ...] = ("tiny", "tiny-head")  # the shipped ones, and folders
    env_ids: tuple[str, ...] = ENV_IDS  # each by its own cost model
    temperatures: tuple[float, ...] = (0.0, 0.6)
    split: str = "test"
    trace: str | None = None  # name or file of a trace of other prompts, at one temperature; by default those that ship
    reference: bool = True  # boosted trees too: a minute for each environment and temperature
    out: Path | None = None  # folder for policy_limits.csv, .md and .json; by default benchmarks/results/cpu


def main(args: Args) -> None:
    console, rows = Console(), []
    policies = {name: load_policy(name) for name in args.policies}
    with progress_bar(console) as bar:
        cases = [(env_id, temperature) for env_id in args.env_ids for temperature in args.temperatures]
        for env_id, temperature in bar.track(cases, description="policies and references"):
            rows += compare(args, env_id, temperature, policies)
    print_table(f"modelled speedup, {args.split} prompts, embedded model", rows, console)
    about = {"command": " ".join(["python -m benchmarks.policy_limits", *sys.argv[1:]]), **machine()}
    name = "policy_limits" if args.trace is None else f"policy_limits-{Path(args.trace).stem}"
    write_results(args.out or RESULTS / "cpu", name, rows, about)


def compare(args: Args, env_id: str, temperature: float, policies: dict[str, TrainedPolicy]) -> list[dict[str, Any]]:
    """The rows of one environment and temperature."""
    settings: dict[str, Any] = dict(backend="trace", trace=args.trace, temperature=temperature, reward="throughput")
    reads = {name: None for policy in policies.values() for name in policy.features}
    env: Any = gym.make(env_id, split=args.split, features=extended_for(env_id, reads), **settings).unwrapped
    table = tabulate(env)
    assert isinstance(table, DraftTable)
    cost_model = pinned(env_id).cost_model
    setting, static = best_fixed(table, load_cost_model(cost_model))
    played = {setting: static, TUNED: tuned(env_id, env.prompt_ids, args.split, settings)}
    learned: dict[str, ExitPolicy] = {name: policy.relabelled(table.mdp.n_layers) for name, policy in policies.items()}
    if args.reference:
        for name, policy in policies.items():
            learned[f"trees on the features of {name}"] = fit_reference(env_id, features=policy.features, **settings)
        learned["trees on all features"] = fit_reference(env_id, features=env.features, **settings)
    for name, policy in learned.items():
        least = getattr(policy, "bonus_from", 0.0)
        rounds = table.without_bonus(least, load_cost_model(cost_model)) if least else table
        played[name] = rounds.play(table.decisions(policy))
        if least:
            played[f"{name}, always with a bonus token"] = table.play(table.decisions(policy))
    played["clairvoyant"] = best = table.fastest()
    about = {"environment": env_id, "costs": cost_model, "T": temperature}
    rows = [row_of(name, totals, played[TUNED], static, best, table.mdp) for name, totals in played.items()]
    return [{"policy": row["policy"], **about, **row} for row in rows]


def best_fixed(table: DraftTable, costs: CostModel) -> tuple[str, Totals]:
    """The static setting that is fastest on these prompts, and its totals."""
    accepted = acceptance(table)
    best, _ = best_static(accepted, costs)
    e, d = best.exit_layer, best.speculation
    return f"static e={e} d={d}, best of these prompts", fixed(table, accepted[e], e, d, costs)


def tuned(env_id: str, prompt_ids: Sequence[str], split: str, settings: dict[str, Any]) -> Totals:
    """Of every prompt with the static setting that is fastest on its task's validation prompts."""
    costs = load_cost_model(pinned(env_id).cost_model)
    by_prompt: dict[str, list[np.ndarray]] = {}
    for task in TASKS:
        parts: list[Any] = [
            gym.make(env_id, split=part, task=task, **settings).unwrapped for part in ("validation", split)
        ]
        validation, played = map(tabulate, parts)
        assert isinstance(validation, DraftTable) and isinstance(played, DraftTable)
        best, _ = best_static(acceptance(validation), costs)
        e, d = best.exit_layer, best.speculation
        totals = fixed(played, acceptance(played)[e], e, d, costs)
        names = list(totals)
        by_prompt |= dict(zip(parts[1].prompt_ids, np.stack(list(totals.values()), axis=-1), strict=True))
    return dict(zip(names, np.stack([by_prompt[prompt] for prompt in prompt_ids], axis=-1), strict=True))


def acceptance(table: DraftTable) -> dict[int, list[np.ndarray]]:
    """By candidate layer, which drafts of each text are accepted."""
    texts = table.texts
    right = table.backend.trace.accepted[texts.rows]  # (X, T, C)
    return {
        layer: [own[there, column] for own, there in zip(right, texts.there, strict=True)]
        for column, layer in enumerate(table.mdp.candidate_layers)
    }


def fixed(table: DraftTable, accepted: list[np.ndarray], e: int, d: int, costs: CostModel) -> Totals:
    """The totals of a static setting, from what its layer gets right of each text."""
    each = [static_result([text], e, d, costs) for text in accepted]
    sums = {
        "emitted": [result.tokens for result in each],
        "cost": [result.cost for result in each],
        "drafted": [result.drafted for result in each],
        "accepted": [result.accepted for result in each],
        "rounds": [result.rounds for result in each],
        "exit_layers": [e * result.drafted for result in each],
        "decisions": [0 for _ in each],
    }
    return {name: table.texts.per_prompt(np.array(values, np.float64)) for name, values in sums.items()}


def row_of(name: str, totals: Totals, tuned: Totals, static: Totals, best: Totals, mdp: DraftMDP) -> dict[str, Any]:
    """One policy's figures; intervals are paired bootstraps over prompts."""
    sums = {key: float(values.sum()) for key, values in totals.items()}
    low, high = (float(t["emitted"].sum() / t["cost"].sum()) for t in (static, best))
    speedup = sums["emitted"] / sums["cost"]
    ratios = {}
    for baseline, played in (("static", static), (TUNED, tuned)):
        over, least, most = ratio_interval(*(np.stack([t["cost"], t["emitted"]], -1) for t in (played, totals)))
        ratios |= {f"over {baseline}": over, f"over {baseline}, 95 %": f"{least:.3f} to {most:.3f}"}
    return {
        "policy": name,
        "modelled speedup": speedup,
        **ratios,
        "of the distance to the clairvoyant, %": 100.0 * (speedup - low) / (high - low),
        "decisions free": sums["emitted"] / (sums["cost"] - sums["decisions"] * mdp.decision_cost),
        "decisions a round": sums["decisions"] / sums["rounds"],
        "E": sums["exit_layers"] / sums["drafted"],
        "d": sums["drafted"] / sums["rounds"],
        "acceptance": sums["accepted"] / sums["drafted"],
    }


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
