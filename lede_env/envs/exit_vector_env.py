"""The exit MDP for many sequences at once: arrays over a trace, or one forward of the language model for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from lede_env.envs.exit_config import ExitConfig
from lede_env.envs.exit_mdp import ExitMDP, make_exit_mdp
from lede_env.envs.vector_env import ALL, Played, TextVectorEnv, masked
from lede_env.errors import LedeError


class SpeculativeExitVectorEnv(TextVectorEnv):
    """
    ## Description
    `gym.make_vec("LEDE-Tiny-v0", num_envs=N)`: N `SpeculativeExitEnv`s, which see for spaces, rewards and arguments.
    Environment i, reset with seed s + i, does what the single one does with that seed, whatever N is.

    ## Resets
    `autoreset_mode` is `SAME_STEP` by default; `NEXT_STEP` and `DISABLED` work as in Gymnasium too;
    under `DISABLED` an episode that has ended sleeps until it is reset: reward 0, no flags, its action ignored.
    `reset(seed=)` takes a seed, or one each. `options={"reset_mask": ...}`, (N,) booleans, resets some and leaves the
    others where they are; `options={"prompt_ids": [...]}` chooses the prompts, one each, None where the environment
    shall draw it.

    ## Info
    Every key of the single environment as an array (N,), with a mask `_key` beside it, in `reward_terms` too. Keys
    that only an exit has are -1 (`accepted`: false) where the mask is false.

    One thing differs from Gymnasium's own vector environments. Keys of the action (`cost, discount, forced,
    reward_terms, exit_layer, draft_token, target_token, accepted`) always describe the action just taken, also where
    `SAME_STEP` has reset the environment in the same step, so no reader needs a special case for the last step of an
    episode. `final_info` repeats the whole info of the episodes that have just ended, `final_obs` is (N, F); their rows
    count where `_final_info` and `_final_obs` are true.
    """

    def __init__(
        self, num_envs: int = 1, *, autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP, **kwargs: Any
    ):
        if num_envs < 1:
            raise LedeError(f"num_envs={num_envs} must be at least 1")
        mdp = make_exit_mdp(ExitConfig.parse(kwargs), lanes=num_envs)
        super().__init__(mdp, num_envs, autoreset_mode, in_parts=mdp.token_episodes)
        self._lanes = np.arange(num_envs)
        self._token = np.zeros(num_envs, np.int64)
        self._candidate = np.zeros(num_envs, np.int64)
        self._outcomes = _Outcomes.of(mdp)

    def _start(self, lanes: np.ndarray, new: np.ndarray) -> None:
        self._token[lanes[new]] = 0
        self._candidate[lanes] = 0

    def _play(self, exits: np.ndarray, awake: np.ndarray) -> Played:
        table, outcomes, candidate = self._table, self._outcomes, self._candidate
        row, cell = self._places(ALL)
        wanted, exits = exits, (exits | (candidate == len(self._layers) - 1)) & awake
        right = exits & table.accepted.reshape(-1).take(cell, mode="clip")
        ended = exits & table.ends.take(row, mode="clip")
        self._token = self._token + exits
        truncated = exits & ~ended & (self._token == self._mdp.max_new_tokens)
        kind = candidate * KINDS + exits + right
        if awake.all():
            self._candidate = outcomes.following.take(kind)
        else:
            kind[~awake] = len(outcomes.reward) - 1
            self._candidate = np.where(awake, outcomes.following.take(kind), candidate)
        of_action = {
            "cost": outcomes.cost.take(kind),
            "discount": outcomes.discount.take(kind),
            "forced": exits & ~wanted,
            "reward_terms": masked({name: of.take(kind) for name, of in outcomes.terms.items()}, self._everyone),
        }
        of_exit = {
            "exit_layer": outcomes.exit_layer.take(kind),
            "draft_token": np.where(exits, table.drafts.reshape(-1).take(cell, mode="clip"), -1),
            "target_token": np.where(exits, table.targets.take(row, mode="clip"), -1),
            "accepted": right,
        }
        info = masked(of_action, self._everyone) | masked(of_exit, exits)
        return Played(outcomes.reward.take(kind), exits, ended, truncated, info)

    def _places(self, lanes: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Where lanes stand in the backend's tables, (n,) both: the row, and the cell, which is a row's candidate.

        Cells because `take` from a flat table is five times as fast as indexing by two arrays; clipped, because a
        text that is over may stand just past the tables: what is read there counts for nothing.
        """
        row = self._table.base[lanes] + self._token[lanes]
        return row, row * len(self._layers) + self._candidate[lanes]

    def _observations(self, lanes: np.ndarray | slice = ALL) -> np.ndarray:
        """(n, F) float32: what lanes see; zeros where there is no text to see."""
        blank = self._blank[lanes]
        behind = (self._table.known[lanes] <= self._token[lanes]) & ~blank
        if behind.any():
            for lane in self._lanes[lanes][behind].tolist():
                self._table.ensure(lane, int(self._token[lane]))
        _, cell = self._places(lanes)
        table = self._table.observations.reshape(-1, len(self.features))  # (cells, F)
        observations = table.take(cell, axis=0, mode="clip")
        if blank.any():
            observations[blank] = 0.0
        return observations

    def _infos(self) -> dict[str, Any]:
        """Of the observation returned."""
        info = {
            "prompt_id": self._prompt_id,
            "token_index": self._token.copy(),
            "layer": self._layers.take(self._candidate),
        }
        return masked(info, self._everyone)


KINDS = 3  # of actions at a candidate: continue, exit with a wrong draft, exit with a right one


@dataclass(frozen=True)
class _Outcomes:
    """All that follows from an action's kind, by candidate * KINDS + kind; the last entry is for no action.

    Small tables, because looking N entries up is faster than selecting by masks.
    """

    reward: np.ndarray
    terms: dict[str, np.ndarray]
    cost: np.ndarray
    discount: np.ndarray
    exit_layer: np.ndarray
    following: np.ndarray  # the candidate after it

    @classmethod
    def of(cls, mdp: ExitMDP) -> _Outcomes:
        layers, reward = np.array(mdp.candidate_layers), mdp.reward

        def table(continued: Any, wrong: Any, right: Any, idle: Any) -> np.ndarray:
            kinds = [np.broadcast_to(value, len(layers)) for value in (continued, wrong, right)]
            return np.append(np.stack(kinds, axis=1), idle)

        terms = {
            "accepted": table(0.0, 0.0, reward.accepted, 0.0),
            "rejected": table(0.0, reward.rejected, 0.0, 0.0),
            "continue": table(reward.continue_, 0.0, 0.0, 0.0),
        }
        return cls(
            reward=np.sum(list(terms.values()), axis=0),
            terms=terms,
            cost=table(mdp.step_cost, mdp.step_cost, mdp.step_cost, 0.0),
            discount=table(1.0, 0.0, 0.0, 1.0),
            exit_layer=table(-1, layers, layers, -1),
            following=table(np.arange(1, len(layers) + 1), 0, 0, 0),
        )
