"""The exit MDP for many sequences at once: arrays over a trace, or one forward of the language model for all."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from lede_env.envs.exit_config import ExitConfig
from lede_env.envs.exit_mdp import make_exit_mdp
from lede_env.envs.exit_outcomes import EXITING, Outcomes
from lede_env.envs.vector_env import ALL, Played, TextVectorEnv, check_num_envs, masked, select


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
        check_num_envs(num_envs)
        mdp = make_exit_mdp(ExitConfig.parse(kwargs), lanes=num_envs)
        super().__init__(mdp, num_envs, autoreset_mode, in_parts=mdp.token_episodes)
        self._lanes = np.arange(num_envs)
        self._outcomes = Outcomes.of(mdp.candidate_layers, mdp.reward, mdp.step_cost)
        # Infos hold these two, so they are replaced, not written.
        self._token = np.zeros(num_envs, np.int64)
        self._layer = np.full(num_envs, self._layers[0])
        self._cell = np.zeros(num_envs, np.int64)  # where lanes stand in the tables: row C + candidate

    def _start(self, lanes: np.ndarray, new: np.ndarray) -> None:
        self._token, self._layer = self._token.copy(), self._layer.copy()
        self._token[lanes[new]] = 0
        self._layer[lanes] = self._layers[0]
        self._cell[lanes] = (self._table.base[lanes] + self._token[lanes]) * len(self._layers)

    def _play(self, exits: np.ndarray, awake: np.ndarray) -> Played:
        table, outcomes, cell = self._table, self._outcomes, self._cell
        # `take` is five times as fast as indexing. Clipped, because a text that is over may stand just past the
        # tables; what is read there counts for nothing.
        number = table.numbers.reshape(-1).take(cell, mode="clip") + EXITING * exits
        if awake.all():
            self._layer = outcomes.layer.take(number)
        else:
            number[~awake] = outcomes.idle
            self._layer = np.where(awake, outcomes.layer.take(number), self._layer)
        left = outcomes.exits.take(number)
        of_action = {
            "cost": outcomes.cost.take(number),
            "discount": outcomes.discount.take(number),
            "forced": outcomes.forced.take(number),
            "reward_terms": masked({name: of.take(number) for name, of in outcomes.terms.items()}, self._everyone),
        }
        row = table.base + self._token
        of_exit = {
            "exit_layer": outcomes.exit_layer.take(number),
            "draft_token": select(left, table.drafts.reshape(-1).take(cell, mode="clip"), -1),
            "target_token": select(left, table.targets.take(row, mode="clip"), -1),
            "accepted": outcomes.accepted.take(number),
        }
        self._token = self._token + left
        self._cell = cell + outcomes.onward.take(number)
        info = masked(of_action, self._everyone) | masked(of_exit, left)
        ended, truncated = outcomes.ends.take(number), outcomes.truncates.take(number)
        return Played(outcomes.reward.take(number), left, ended, truncated, info)

    def _observations(self, lanes: np.ndarray | slice = ALL) -> np.ndarray:
        """(n, F) float32: what lanes see; zeros where there is no text to see."""
        blank, table = self._blank[lanes], self._table
        behind = (table.known[lanes] <= self._token[lanes]) & ~blank
        if behind.any():
            for lane in self._lanes[lanes][behind].tolist():
                table.ensure(lane, int(self._token[lane]))
        observations = table.observations.reshape(-1, len(self.features)).take(self._cell[lanes], axis=0, mode="clip")
        if blank.any():
            observations[blank] = 0.0
        return observations

    def _infos(self) -> dict[str, Any]:
        """Of the observation returned."""
        info = {"prompt_id": self._prompt_id, "token_index": self._token, "layer": self._layer}
        return masked(info, self._everyone)
