"""The exit MDP for many sequences at once: arrays over a trace, or one forward of the language model for all."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from lede_env.envs.exit_config import ExitConfig
from lede_env.envs.exit_mdp import make_exit_mdp
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

    def _start(self, lanes: np.ndarray, new: np.ndarray) -> None:
        self._token[lanes[new]] = 0
        self._candidate[lanes] = 0

    def _play(self, exits: np.ndarray, awake: np.ndarray) -> Played:
        info = self._outcome(exits, awake)
        exits = info["_exit_layer"]  # the forced ones too
        ended = exits & self._table.ends.take(self._table.base + self._token, mode="clip")
        truncated = exits & ~ended & (self._token + 1 == self._mdp.max_new_tokens)
        self._token = self._token + exits
        self._candidate = np.where(exits, 0, self._candidate + awake)
        terms = info["reward_terms"]
        return Played(terms["accepted"] + terms["rejected"] + terms["continue"], exits, ended, truncated, info)

    def _outcome(self, wanted: np.ndarray, awake: np.ndarray) -> dict[str, Any]:
        """Info of the actions of the lanes that are awake; for the others, that of a reset."""
        table, reward, candidate = self._table, self._mdp.reward, self._candidate
        row, cell = self._places(ALL)
        last = candidate == len(self._layers) - 1
        exits = (wanted | last) & awake
        right = exits & table.accepted.reshape(-1).take(cell, mode="clip")
        terms = {
            "accepted": np.where(right, reward.accepted.take(candidate), 0.0),
            "rejected": np.where(exits & ~right, reward.rejected, 0.0),
            "continue": np.where(awake & ~exits, reward.continue_, 0.0),
        }
        of_action = {
            "cost": self._mdp.step_cost.take(candidate) * awake,
            "discount": np.where(exits, 0.0, 1.0),
            "forced": exits & ~wanted,
            "reward_terms": masked(terms, self._everyone),
        }
        of_exit = {
            "exit_layer": np.where(exits, self._layers.take(candidate), -1),
            "draft_token": np.where(exits, table.drafts.reshape(-1).take(cell, mode="clip"), -1),
            "target_token": np.where(exits, table.targets.take(row, mode="clip"), -1),
            "accepted": right,
        }
        return masked(of_action, self._everyone) | masked(of_exit, exits)

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
        for lane in self._lanes[lanes][behind].tolist():
            self._table.ensure(lane, int(self._token[lane]))
        _, cell = self._places(lanes)
        table = self._table.observations.reshape(-1, len(self.features))  # (cells, F)
        observations = table.take(cell, axis=0, mode="clip")
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
