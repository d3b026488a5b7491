"""Exact scores, over and over: as `lede_env.evaluate`, but what does not depend on the policy is made only once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gymnasium as gym

from lede_env.evaluation import Evaluation
from lede_env.oracles import DraftTable, ExitTable, tabulate
from lede_env.policies import RandomPolicy, check_compatible
from lede_env.registration import extended_for


@dataclass(frozen=True)
class Problem:
    """An environment's prompts on its trace, and the ends of its scale."""

    env_id: str
    env: Any
    table: ExitTable | DraftTable
    J_random: float
    J_oracle: float

    def judge(self, policy: Any) -> Evaluation:
        """What a policy does on the prompts, exactly.

        One that decides from more than the observation in view has `decisions(table)` instead of `exit_probability`.
        """
        if hasattr(policy, "decisions"):
            exits = policy.decisions(self.table)
        else:
            known = self.env.attributes
            layers, features = known["candidate_layers"], self.env.features
            check_compatible(policy, known["model_fingerprint"], layers, features, known["mdp"])
            exits = self.table.decisions(policy)
        return Evaluation(
            env_id=self.env_id,
            prompt_ids=tuple(self.env.prompt_ids),
            per_prompt=self.table.play(exits),
            J_random=self.J_random,
            J_oracle=self.J_oracle,
        )


def problem(env_id: str, split: str, env_kwargs: Mapping[str, Any], reads: Sequence[str] = ()) -> Problem:
    """The problem that an environment poses on the prompts of a split; `reads`: features of an acceptance head too."""
    return _problem(env_id, split, json.dumps(env_kwargs, sort_keys=True), extended_for(env_id, reads))


@lru_cache(maxsize=8)
def _problem(env_id: str, split: str, env_kwargs: str, features: str | tuple[str, ...]) -> Problem:
    kwargs = {"backend": "trace", **json.loads(env_kwargs), "split": split, "features": features}
    env: Any = gym.make(env_id, **kwargs).unwrapped
    table = tabulate(env)
    random, oracle = table.play(table.decisions(RandomPolicy())), table.oracle()
    return Problem(env_id, env, table, float(random["returns"].mean()), float(oracle["returns"].mean()))


def judge(policy: Any, env_id: str, split: str, env_kwargs: Mapping[str, Any]) -> Evaluation:
    """What a policy does on an environment's prompts, exactly: `Problem.judge`."""
    return problem(env_id, split, env_kwargs, getattr(policy, "features", ())).judge(policy)
