"""The exit MDP's steps on a trace, as tensors: `SpeculativeExitVectorEnv` with its tables on a device."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lede_env.envs.exit_mdp import ExitMDP
from lede_env.envs.exit_outcomes import EXITING, Outcomes
from lede_env.envs.vector_env import Played, masked


class TensorExits:
    """Where N lanes stand, and what their actions do. Tensors are replaced, never written: infos hold them."""

    def __init__(self, mdp: ExitMDP, lanes: int, device: torch.device):
        put = partial(torch.tensor, device=device)
        table: Any = mdp.backend
        self._width, self._first_layer = len(mdp.candidate_layers), mdp.candidate_layers[0]
        # By cell: row C + candidate.
        self._signals = put(table.observations.reshape(-1, len(mdp.features)))
        self._numbers, self._drafts = put(table.numbers.reshape(-1)), put(table.drafts.reshape(-1))
        self._targets = put(table.targets)  # by row
        # By number of the outcome, those of one type together: a lookup fetches them all.
        outcomes = Outcomes.of(mdp.candidate_layers, mdp.reward, mdp.step_cost)
        amounts = outcomes.reward, outcomes.cost, outcomes.discount, *outcomes.terms.values()
        flags = outcomes.exits, outcomes.forced, outcomes.accepted, outcomes.ends, outcomes.truncates
        places = outcomes.exit_layer, outcomes.layer, outcomes.onward
        self._amounts, self._flags, self._places = (put(np.stack(each)) for each in (amounts, flags, places))
        self._terms, self._idle = list(outcomes.terms), outcomes.idle
        self._everyone = torch.ones(lanes, dtype=torch.bool, device=device)
        self._token = self._cell = torch.zeros(lanes, dtype=torch.int64, device=device)
        self._layer = torch.full_like(self._token, self._first_layer)

    def begin(self, lanes: Tensor, new: Tensor, base: Tensor) -> None:
        """Begin episodes on the lanes of a mask; those of `new`, another, on a text whose first row `base` says."""
        self._token = self._token.masked_fill(new, 0)
        self._layer = self._layer.masked_fill(lanes, self._first_layer)
        self._cell = torch.where(lanes, (base + self._token) * self._width, self._cell)

    def play(self, exits: Tensor, awake: Tensor) -> Played:
        """Exit or continue where lanes are awake, (N,) booleans both; to the others nothing happens."""
        cell = self._cell
        number = (self._numbers[cell] + EXITING * exits).masked_fill(~awake, self._idle)
        reward, cost, discount, *terms = self._amounts.index_select(1, number)
        left, forced, accepted, ended, truncated = self._flags.index_select(1, number)
        exit_layer, layer, onward = self._places.index_select(1, number)
        missing = ~left
        of_action = {
            "cost": cost,
            "discount": discount,
            "forced": forced,
            "reward_terms": masked(dict(zip(self._terms, terms, strict=True)), self._everyone),
        }
        of_exit = {
            "exit_layer": exit_layer,
            "draft_token": self._drafts[cell].masked_fill(missing, -1),
            "target_token": self._targets[cell // self._width].masked_fill(missing, -1),
            "accepted": accepted,
        }
        self._token = self._token + left
        self._layer = torch.where(awake, layer, self._layer)
        self._cell = (cell + onward).clamp(max=len(self._numbers) - 1)  # the last text may end with the tables
        info = masked(of_action, self._everyone) | masked(of_exit, left)
        return Played(reward, left, ended, truncated, info)

    def observations(self) -> Tensor:
        """(N, F) float32: what lanes see that have a text to see, a fresh tensor."""
        return self._signals[self._cell]

    def infos(self) -> dict[str, Any]:
        """Of the observation returned."""
        return {"token_index": self._token, "layer": self._layer}
