"""Optimal stopping with full information: our own agent for the draft MDP, trained on traces alone.

A trace knows what would have come of every decision, so no exploration and no bootstrapping are needed. At every state
a round can be in, and for the policy as it stands, the *advantage* of exiting over continuing is known exactly, its
later decisions included. A decision tree learns that advantage from what can be observed, the policy becomes greedy
on the tree, and the advantages are computed anew (Longstaff and Schwartz, 2001; fitted policy iteration). A tree, for
its decisions cost the decoder a fraction of a network's on a CPU, and are as good.

What a round is worth is the reward `throughput`: tokens emitted - rho * its modelled cost, every decision paid for;
rho is the policy's own rate, renewed with it (Dinkelbach), so that the fixed point maximises tokens per second.

    python -m agents.optimal_stopping --traces tiny-greedy-v0 tiny-t0.6-v0 --out runs/optimal_stopping
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from agents.advantages import draft_advantages, draft_questions
from agents.judge import Problem, problem
from agents.task import Board, record_history, summary
from agents.tree import Tree
from lede_env.arguments import clear_errors
from lede_env.data.registry import load_trace
from lede_env.display.progress import progress_bar
from lede_env.engine.cost_model import load_cost_model
from lede_env.engine.signals import asks_head, select_features
from lede_env.errors import LedeError
from lede_env.oracles import DraftTable, ask
from lede_env.policies import ExitPolicy, StaticRounds, TreePolicy, check_bonus

ENV_ID = "LEDE-Tiny-Draft-v0"  # the draft MDP; a trace says which model it is of
SPLITS = ("train", "validation")
START = 5  # drafts a round of the policy that iteration begins with, at the first candidate layer


@dataclass
class Args:
    """Train on traces; the policy of the iteration that is fastest on their validation prompts is kept."""

    traces: tuple[str, ...] = ("tiny-greedy-v0", "tiny-t0.6-v0")  # names or files; all count alike
    cost_model: str = "tiny-at-7b-h200"  # what time costs; what it favours does as well by the costs of `tiny-cpu`
    features: tuple[str, ...] = (  # what the policy observes
        "margin", "layer", "match", "echo", "phase", "position", "doubt", "temperature", "drawn", "peril",
    )  # fmt: skip
    bonus_from: float = 0.0  # a round less likely than this to be accepted whole gives up its bonus token; 0: none does
    out: Path = Path("runs/optimal_stopping")  # folder for history.csv and policy/
    seed: int = 1  # one seed reproduces a run bit for bit

    iterations: int = 8  # of: advantages, fit, new policy
    leaves: int = 64  # of the tree
    leaf_rows: int = 100  # fewest observations in one
    off_path: float = 0.1  # weight of states that the policy as it stands does not visit

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("leaves", 2), ("leaf_rows", 1)):
            if getattr(self, name) < least:
                raise LedeError(f"{name}={getattr(self, name)}; expected at least {least}")
        if not 0.0 <= self.off_path <= 1.0:
            raise LedeError(f"off_path={self.off_path}; expected a weight in [0, 1]")
        check_bonus(self.bonus_from, self.features)


class States:
    """Where a policy is asked in all rounds that could be played: S places of the table, and (S, F) what is seen."""

    def __init__(self, table: DraftTable):
        self.table = table
        self.asked = np.zeros(table.nodes.shape, bool)  # (X, T, C, K)
        for k, where in draft_questions(table):
            self.asked[..., k - 1] = where
        *cell, k = np.nonzero(self.asked)
        self.observations = table.backend.observe(table.nodes[self.asked], table.cells[tuple(cell)], k + 1)

    def advantages(self, policy: ExitPolicy, rho: float) -> tuple[np.ndarray, np.ndarray]:
        """(S,) exact advantage of exiting under a policy, by tokens - rho * cost, and whether it comes there."""
        table, exits = self.table, np.zeros(self.asked.shape)
        exits[self.asked] = ask(policy, table.backend.features, self.observations)
        plain = table.rounds - 1  # the step at full depth that may end a text is no part of the round before
        worth = table.emitted - plain - rho * (table.cost - plain * table.mdp.plain_cost)
        advantage, visited = draft_advantages(table, exits, worth)
        return advantage[self.asked], visited[self.asked]


def settings_of(trace: str, args: Args) -> dict[str, Any]:
    """Arguments of the draft MDP that is played on a trace."""
    header = load_trace(trace).header
    recorded = ("candidate_layers", "temperature", "top_k", "top_p", "max_new_tokens")
    # With a rho of 1, a return is the time saved over autoregressive decoding, in its steps.
    costs = {"reward": "throughput", "rho": 1.0, "cost_model": args.cost_model}
    return {"model": header.model_name, "trace": trace, **costs, **{name: getattr(header, name) for name in recorded}}


def posed(its: Problem, args: Args) -> Problem:
    """The problem with rounds as the policy will have the decoder play them. Its scale stays that of the MDP."""
    if not args.bonus_from or not isinstance(its.table, DraftTable):
        return its
    return replace(its, table=its.table.without_bonus(args.bonus_from, load_cost_model(args.cost_model)))


def train(args: Args, report: Callable[[dict], None] = lambda row: None) -> tuple[TreePolicy, list[dict]]:
    """Fitted policy iteration; returns the best policy on the validation prompts, and a row an iteration."""
    problems = {
        split: [posed(problem(ENV_ID, split, settings_of(trace, args), args.features), args) for trace in args.traces]
        for split in SPLITS
    }
    known, *others = (each.env.attributes for each in problems["train"])
    if any(other[key] != known[key] for other in others for key in ("model_fingerprint", "candidate_layers")):
        raise LedeError(f"traces {args.traces} are of different models or candidate layers; give traces of one model")
    features, available = select_features(args.features, "draft"), problems["train"][0].env.features
    states = [States(each.table) for each in problems["train"]]
    seen = np.concatenate([each.observations for each in states])[:, [available.index(name) for name in features]]
    tree = Tree(args.leaves, args.leaf_rows, args.seed)
    policy: ExitPolicy = StaticRounds(known["candidate_layers"][0], START, known["n_layers"], known["cap"])
    rates = [each.judge(policy).modelled_speedup for each in problems["train"]]
    history: list[dict] = []
    best: tuple[float, TreePolicy | None] = (0.0, None)
    for iteration in range(args.iterations):
        parts = [each.advantages(policy, rho) for each, rho in zip(states, rates, strict=True)]
        advantage, visited = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        weights = np.where(visited, 1.0, args.off_path)
        loss = tree.fit(seen, advantage, weights)
        policy = replace(tree.export(known, features, {}), bonus_from=args.bonus_from)
        played = {split: [each.judge(policy) for each in several] for split, several in problems.items()}
        rates = [each.modelled_speedup for each in played["train"]]
        speedups = [each.modelled_speedup for split in SPLITS for each in played[split]]
        curves = mean_of([summary(each) for each in played["validation"]])
        row = {"iteration": iteration, "loss": loss, **curves, **dict(zip(rates_of(args), speedups, strict=True))}
        history.append(row)
        report(row)
        score = float(np.mean([each.modelled_speedup for each in played["validation"]]))
        if score > best[0]:
            about = {"agent": "optimal_stopping", "args": {**asdict(args), "out": str(args.out)}, **row}
            best = score, replace(policy, training=json.loads(json.dumps(about)))
    assert best[1] is not None
    heads = {load_trace(trace).head for trace in args.traces} if asks_head(features) else {None}
    if len(heads) > 1:
        raise LedeError(f"traces {args.traces} hold the answers of different acceptance heads; record them with one")
    return replace(best[1], head=heads.pop()), history


def rates_of(args: Args) -> list[str]:
    """Names of the modelled speedups in a row of history: on each split, on each trace."""
    return [f"{split} {Path(trace).name.removesuffix('.h5')}" for split in SPLITS for trace in args.traces]


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """Column by column."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def main(args: Args) -> None:
    console, columns = Console(), ("iteration", *Board.CURVES, *rates_of(args))
    with progress_bar(console) as bar, closing(Board(args.out / "tensorboard")) as board:
        task = bar.add_task("reading the traces", total=args.iterations)

        def show(row: dict) -> None:
            rates = ", ".join(f"{value:.3f}" for name, value in row.items() if name.startswith("validation"))
            bar.update(task, completed=row["iteration"] + 1, description=f"modelled speedup on validation: {rates}")

        with record_history(args.out, columns, board, [], show) as log:
            policy, _ = train(args, lambda row: log(**row))
    folder = policy.save(args.out / "policy")
    console.print(f"{folder}: fastest on validation of {args.iterations} iterations; {args.out / 'history.csv'}")


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Args))
