"""Rewards of the exit MDP, as tables the environments look up (paper section 3.1.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lede_env.errors import LedeError


@dataclass(frozen=True)
class ExitReward:
    """Reward terms by candidate index: `accepted` (C,), `rejected` and `continue_`."""

    accepted: np.ndarray
    rejected: float
    continue_: float


def make_exit_reward(
    name: str, kwargs: Mapping[str, float], candidate_layers: tuple[int, ...], n_layers: int
) -> ExitReward:
    """The reward `paper`: `accept + depth (1 - e / L)` for an accepted exit, `reject` and `continue_` otherwise.

    The paper gives the signs and the roles of L and of the drafted token, not the constants; v0 keeps these defaults:
    accept = 1, depth = 1, reject = -1, continue_ = -0.05.
    """
    if name != "paper":
        raise LedeError(f"reward={name!r} is unknown on the exit MDP; known: 'paper'")
    constants = {"accept": 1.0, "depth": 1.0, "reject": -1.0, "continue_": -0.05}
    unknown = set(kwargs) - set(constants)
    if unknown:
        raise LedeError(f"reward_kwargs has no {sorted(unknown)[0]!r}; the reward 'paper' takes {', '.join(constants)}")
    for constant, value in kwargs.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise LedeError(f"reward_kwargs has {constant}={value!r}; expected a finite number")
        constants[constant] = float(value)
    share = 1.0 - np.array(candidate_layers) / n_layers
    return ExitReward(constants["accept"] + constants["depth"] * share, constants["reject"], constants["continue_"])
