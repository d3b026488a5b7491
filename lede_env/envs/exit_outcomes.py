"""All that can come of an action on the exit MDP, as small tables.

A *cell* is a candidate layer at a position of a text. What an action brings there depends on a few bits: the candidate,
the action, whether the draft is right, and whether the text goes on. They make a number, and every value a step
returns is looked up by it: over thousands of environments, lookups take a fraction of the time of masks and formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lede_env.envs.rewards import ExitReward
from lede_env.policies import EXIT

GOES_ON, ENDS, TRUNCATED = range(3)  # what becomes of a text after a token
ACTIONS, COINS, FATES = 2, 2, 3
EXITING = COINS * FATES  # what the action adds to a cell's number
WAYS = ACTIONS * EXITING  # numbers a candidate has


def number_cells(accepted: np.ndarray, ends: Any, last: Any) -> np.ndarray:
    """(..., C) int16: the outcome of continuing at each cell; `EXITING` more is the outcome of an exit.

    Args:
        accepted: (..., C) whether the candidate's draft is right.
        ends: (...,) whether the position's token is an EOS.
        last: (...,) whether it is the last one that the episode may have.
    """
    fate = np.where(ends, ENDS, np.where(last, TRUNCATED, GOES_ON))
    number = np.arange(accepted.shape[-1]) * WAYS + accepted * FATES + fate[..., None]
    return number.astype(np.int16)  # small, so that a trace's table fits the processor's cache


@dataclass(frozen=True)
class Outcomes:
    """By number of the outcome; the last entry, `idle`, is of no action."""

    reward: np.ndarray
    terms: dict[str, np.ndarray]
    cost: np.ndarray
    discount: np.ndarray
    exits: np.ndarray  # booleans, like the next four
    forced: np.ndarray
    accepted: np.ndarray
    ends: np.ndarray
    truncates: np.ndarray
    exit_layer: np.ndarray  # -1 where there is no exit
    layer: np.ndarray  # the one reached
    onward: np.ndarray  # cells from this one to the next

    @property
    def idle(self) -> int:
        return len(self.reward) - 1

    @classmethod
    def of(cls, layers: Sequence[int], reward: ExitReward, step_cost: np.ndarray) -> Outcomes:
        """The tables of an MDP's candidate layers, rewards, and (C,) costs of a step."""
        n = len(layers)
        candidate, action, right, fate = np.unravel_index(np.arange(n * WAYS), (n, ACTIONS, COINS, FATES))
        exits = (action == EXIT) | (candidate == n - 1)
        right = exits & (right > 0)
        terms = {
            "accepted": np.where(right, reward.accepted[candidate], 0.0),
            "rejected": np.where(exits & ~right, reward.rejected, 0.0),
            "continue": np.where(exits, 0.0, reward.continue_),
        }
        terms = {name: np.append(values, 0.0) for name, values in terms.items()}
        above = np.minimum(candidate + 1, n - 1)  # where a continue leads
        return cls(
            reward=np.sum(list(terms.values()), axis=0),
            terms=terms,
            cost=np.append(step_cost[candidate], 0.0),
            discount=np.append(np.where(exits, 0.0, 1.0), 1.0),
            exits=np.append(exits, False),
            forced=np.append(exits & (action != EXIT), False),
            accepted=np.append(right, False),
            ends=np.append(exits & (fate == ENDS), False),
            truncates=np.append(exits & (fate == TRUNCATED), False),
            exit_layer=np.append(np.where(exits, np.array(layers)[candidate], -1), -1),
            layer=np.append(np.array(layers)[np.where(exits, 0, above)], layers[0]),
            onward=np.append(np.where(exits, n - candidate, 1), 0),
        )
