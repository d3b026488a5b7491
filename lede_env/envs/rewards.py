"""Rewards of the exit MDP, as tables the environments look up (paper section 3.1.3), and of the draft MDP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

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


class DraftReward(Protocol):
    """The reward of a verified round, as named terms that add up to it. Numbers, or arrays of one entry a round."""

    terms: ClassVar[tuple[str, ...]]

    def of_round(self, candidate: Any, continues: Any, drafted: Any, accepted: Any, emitted: Any, cost: Any) -> tuple:
        """The value of each of `terms`.

        Args:
            candidate: index of the layer that drafted.
            continues: how often phase 1 continued.
            drafted, accepted, emitted: the round's counts.
            cost: the round's, in autoregressive steps.
        """
        ...


@dataclass(frozen=True)
class PaperDraftReward:
    """`accept + depth (1 - e / L)` for each accepted draft, `reject` for every other, `continue_` for each phase-1
    continue: the exit MDP's constants, and the same defaults."""

    table: ExitReward
    terms: ClassVar[tuple[str, ...]] = ("accepted", "rejected", "continue")

    def of_round(self, candidate: Any, continues: Any, drafted: Any, accepted: Any, emitted: Any, cost: Any) -> tuple:
        table = self.table
        return (
            table.accepted.take(candidate) * accepted,
            table.rejected * (drafted - accepted),
            table.continue_ * continues,
        )


@dataclass(frozen=True)
class ThroughputReward:
    """Tokens emitted, less `rho` for each autoregressive step's worth of modelled time."""

    rho: float
    terms: ClassVar[tuple[str, ...]] = ("emitted", "cost")

    def of_round(self, candidate: Any, continues: Any, drafted: Any, accepted: Any, emitted: Any, cost: Any) -> tuple:
        return 1.0 * emitted, -self.rho * cost


def make_draft_reward(
    name: str, kwargs: Mapping[str, float], rho: float | None, candidate_layers: tuple[int, ...], n_layers: int
) -> DraftReward:
    """The reward `paper` or `throughput` of the draft MDP (design section 5)."""
    number = isinstance(rho, int | float) and not isinstance(rho, bool) and 0 <= rho < math.inf
    if not number and (name == "throughput" or rho is not None):
        raise LedeError(f"rho={rho!r} must be a number of tokens per autoregressive step, at least 0")
    if name == "paper":
        return PaperDraftReward(make_exit_reward(name, kwargs, candidate_layers, n_layers))
    if name != "throughput":
        raise LedeError(f"reward={name!r} is unknown on the draft MDP; known: 'paper', 'throughput'")
    if kwargs:
        raise LedeError(f"reward_kwargs has {sorted(kwargs)[0]!r}; the reward 'throughput' takes none, only rho")
    assert rho is not None
    return ThroughputReward(float(rho))
