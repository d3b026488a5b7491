"""Exact scores of the policies behind datasets, on one split of a problem's prompts, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np

from lede_env.offline.tiers import Problem, Recipe
from lede_env.oracles import DraftTable, ExitTable, tabulate
from lede_env.policies import ExitPolicy, RandomPolicy

RESAMPLES = 2000


@dataclass(frozen=True)
class Bench:
    """A problem's prompts of one split, and what random play and the clairvoyant return on each, (P,)."""

    env: Any
    table: ExitTable | DraftTable
    random: np.ndarray
    oracle: np.ndarray

    @classmethod
    def of(cls, problem: Problem, split: str) -> Bench:
        kwargs = {**problem.env_kwargs, "split": split, "features": "extended"}
        env: Any = gym.make(problem.env_id, **kwargs).unwrapped
        table = tabulate(env)
        random = table.play(table.decisions(RandomPolicy()))["returns"]
        return cls(env, table, random, table.oracle()["returns"])

    def returns(self, policy: ExitPolicy) -> np.ndarray:
        """(P,) exact returns."""
        return self.table.play(self.table.decisions(policy))["returns"]

    def recipe_returns(self, recipe: Recipe) -> np.ndarray:
        """(P,) of a dataset's behaviours, which take turns."""
        if not recipe.behaviours:
            return self.oracle
        return np.mean([self.returns(behaviour) for behaviour in recipe.behaviours], axis=0)

    def score(self, returns: np.ndarray, prompts: np.ndarray | slice = slice(None)) -> float:
        """100 (J - J_random) / (J_oracle - J_random), J the means over some prompts, by default all."""
        low, high = self.random[prompts].mean(), self.oracle[prompts].mean()
        return float(100 * (returns[prompts].mean() - low) / (high - low))

    def interval(self, *returns: np.ndarray) -> tuple[float, float]:
        """95 % interval, by bootstrap over prompts, of a score, or of how far the first one's is above the second's."""
        picks = np.random.default_rng(0).integers(len(self.random), size=(RESAMPLES, len(self.random)))
        scores = np.array([[self.score(each, pick) for pick in picks] for each in returns])  # (1 or 2, RESAMPLES)
        low, high = np.quantile(scores[0] - scores[1:].sum(0), (0.025, 0.975))
        return float(low), float(high)


def steps_up(bench: Bench, returns: Sequence[tuple[str, np.ndarray]]) -> list[dict[str, Any]]:
    """How far the score of each is above that of the one before it, with its interval."""
    rows = []
    for (below, lower), (name, higher) in pairwise(returns):
        low, high = bench.interval(higher, lower)
        rows.append({"tier": name, "above": below, "by": bench.score(higher) - bench.score(lower),
                     "low": low, "high": high})  # fmt: skip
    return rows
