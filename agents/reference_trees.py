"""The observation-limited reference: how far what can be observed takes a policy, given full information to learn from.

A trace knows what would have come of every decision, so nothing has to be explored and nothing bootstrapped. From the
last decision of a token or round back to its first, boosted trees learn the advantage of exiting from the observation;
what going on is worth is what the decisions already learned come to on each row (Longstaff & Schwartz, 2001).
The clairvoyant optimum has a score of 100; this is an estimate of how much of it observations allow. It needs a trace
to learn from and is no policy file: it is scored on traces alone.

    python -m agents.reference_trees --env-id LEDE-Tiny-Draft-v0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from lede_env.arguments import clear_errors
from lede_env.errors import LedeError
from lede_env.evaluation import evaluate
from lede_env.oracles import DraftTable, ExitTable, tabulate
from lede_env.policies import RandomPolicy

if TYPE_CHECKING:
    from sklearn.ensemble import HistGradientBoostingRegressor

MOST_ROWS = 300_000  # of one fit
RATE_ROUNDS = 3  # times the draft MDP is solved, each with the rate that the policy before reached


@dataclass
class Args:
    """Fit on the training prompts' trace, score on another split's."""

    env_id: str = "LEDE-Tiny-Draft-v0"  # either MDP
    # its keyword arguments, e.g. --env-kwargs trace FILE temperature 0.6
    env_kwargs: dict[str, int | float | str] = field(default_factory=dict)
    split: str = "test"  # to score on
    seed: int = 0


@dataclass(frozen=True)
class TreePolicy:
    """Exits where the trees of the decision in question say that it is worth more than to continue."""

    features: tuple[str, ...]
    candidate_layers: tuple[int, ...]
    n_layers: int
    cap: int
    walk: dict[int, Any]  # by candidate index: the exit MDP's decisions, or phase 1
    drafting: dict[int, Any]  # by draft number, 2 and on: phase 2

    def exit_probability(self, observations: np.ndarray) -> np.ndarray:
        """(N, F) -> (N,) zeros and ones. A decision that was never learned is to continue."""
        columns = dict(zip(self.features, observations.T, strict=True))
        candidate = np.searchsorted(self.candidate_layers, np.rint(columns["layer"] * self.n_layers))
        first = np.zeros(len(observations), np.int64)
        draft = 1 + np.rint(columns.get("position", first) * self.cap).astype(np.int64)
        exits = np.zeros(len(observations))
        for trees, key, asked in ((self.walk, candidate, draft == 1), (self.drafting, draft, draft > 1)):
            for place, tree in trees.items():
                here = asked & (key == place)
                if here.any():
                    exits[here] = tree.predict(observations[here]) > 0.0
        return exits


def fit_reference(
    env_id: str, split: str = "train", seed: int = 0, features: str | Sequence[str] = "extended", **kwargs: Any
) -> TreePolicy:
    """Fit the reference of an environment on its trace.

    Args:
        env_id: either MDP.
        split: prompts to learn from.
        features: what it observes; `layer` and, on the draft MDP, `position` say which decision is asked.
        kwargs: arguments of the environment, to override what the id pins.

    Raises:
        LedeError: as `lede_env.evaluate`; those two features are missing, or scikit-learn is.
    """
    env: Any = gym.make(env_id, **{"backend": "trace", "split": split, **kwargs, "features": features}).unwrapped
    table, fit = tabulate(env), _fitter(seed)
    needed = {"layer", "position"} if isinstance(table, DraftTable) else {"layer"}
    if not needed.issubset(env.features):
        raise LedeError(f"features={env.features}: the reference needs {sorted(needed)} to tell decisions apart")
    walk, drafting = _exit_trees(table, fit) if isinstance(table, ExitTable) else ({}, {})
    cap = table.mdp.cap if isinstance(table, DraftTable) else 1
    if isinstance(table, DraftTable):
        exits = table.decisions(RandomPolicy())
        for _ in range(RATE_ROUNDS):
            totals = table.play(exits)
            rate = totals["returns"].sum() / totals["emitted"].sum()
            walk, drafting, exits = _draft_trees(table, fit, rate)
    return TreePolicy(env.features, tuple(table.mdp.candidate_layers), table.mdp.n_layers, cap, walk, drafting)


Fit = Callable[[np.ndarray, np.ndarray], "HistGradientBoostingRegressor | Constant"]


@dataclass(frozen=True)
class Constant:
    """What is known where there is nothing to learn from, or nothing to tell."""

    value: float

    def predict(self, observations: np.ndarray) -> np.ndarray:
        return np.full(len(observations), self.value)


def _fitter(seed: int) -> Fit:
    try:
        from sklearn.ensemble import HistGradientBoostingRegressor
    except ImportError as error:
        raise LedeError("the reference needs scikit-learn; pip install scikit-learn") from error
    rng = np.random.default_rng(seed)

    def fit(observations: np.ndarray, advantages: np.ndarray) -> HistGradientBoostingRegressor | Constant:
        if not len(advantages) or np.ptp(advantages) == 0.0:
            return Constant(float(advantages[0]) if len(advantages) else 0.0)
        if len(advantages) > MOST_ROWS:
            rows = rng.choice(len(advantages), MOST_ROWS, replace=False)
            observations, advantages = observations[rows], advantages[rows]
        leaf = min(100, 1 + len(advantages) // 50)
        trees = HistGradientBoostingRegressor(
            max_iter=80, learning_rate=0.08, max_leaf_nodes=12, min_samples_leaf=leaf, random_state=seed
        )
        return trees.fit(observations, advantages)

    return fit


def _exit_trees(table: ExitTable, fit: Fit) -> tuple[dict[int, Any], dict[int, Any]]:
    """Trees of the exit MDP, last candidate but one first."""
    there = table.texts.there
    value = table.chance * table.if_accepted + (1.0 - table.chance) * table.if_rejected  # (X, T, C) of exiting
    going_on, trees = value[..., -1][there], {}  # (n,) of the policy, from the next candidate on
    for candidate in reversed(range(value.shape[-1] - 1)):
        exiting, seen = value[..., candidate][there], table.observations(candidate, there)
        trees[candidate] = fit(seen, exiting - going_on)
        going_on = np.where(trees[candidate].predict(seen) > 0.0, exiting, going_on)
    return trees, {}


def _draft_trees(table: DraftTable, fit: Fit, rate: float) -> tuple[dict[int, Any], dict[int, Any], np.ndarray]:
    """Trees of phase 1 and of phase 2, and the decisions they make on the table.

    A round is a problem of its own once each token it emits is charged with the return that a token is worth
    elsewhere: `rate`, return a token. All of a text's tokens are emitted by some round, so the sums agree.
    """
    value = table.reward - rate * table.emitted  # (X, T, C, K) of verifying
    exits = np.zeros(value.shape)
    walk: dict[int, Any] = {}
    drafting: dict[int, Any] = {}

    def decide(trees: dict[int, Any], key: int, draft: int, where: np.ndarray, exiting: Any, staying: Any) -> Any:
        """Learn one decision where it is asked, (X, T, C) booleans; the value of its being made so."""
        seen = table.observations(draft, where)
        trees[key] = fit(seen, (exiting - staying)[where])
        exits[where, draft - 1] = trees[key].predict(seen) > 0.0 if len(seen) else 0.0
        return np.where(where & (exits[..., draft - 1] > 0.0), exiting, staying)

    further = value[..., -1]  # of the policy, once a draft is made
    for draft in reversed(range(2, table.mdp.cap)):
        further = decide(drafting, draft, draft, table.asked(draft), further, value[..., draft - 1])
    further = np.where(table.lengths == 1, value[..., 0], further)  # of leaving at a candidate
    last = value.shape[2] - 1
    staying = value[..., 0]  # at the last candidate: one draft
    for candidate in reversed(range(last + 1)):
        where = np.zeros(further.shape, bool)
        where[..., candidate] = table.asked(1)[..., candidate]
        walked = decide(walk, candidate, 1, where, further, staying)[..., candidate]
        staying = np.broadcast_to(walked[..., None], further.shape)  # at the candidate before: to walk here
    return walk, drafting, exits


def main(args: Args) -> None:
    policy = fit_reference(args.env_id, seed=args.seed, **args.env_kwargs)
    for split in dict.fromkeys(("train", args.split)):
        print(f"{split}: {evaluate(policy, args.env_id, split, **args.env_kwargs)}")


if __name__ == "__main__":
    import tyro

    with clear_errors():
        main(tyro.cli(Args))
