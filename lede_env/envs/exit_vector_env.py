"""The exit MDP for many sequences at once: one forward of the language model serves all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from lede_env.envs.exit_config import ExitConfig
from lede_env.envs.exit_mdp import make_exit_mdp
from lede_env.envs.texts import draw_key, draw_texts, prompt_index
from lede_env.errors import LedeError
from lede_env.policies import CONTINUE, EXIT

ALL = slice(None)


class SpeculativeExitVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
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

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012 - Gymnasium's form

    def __init__(
        self, num_envs: int = 1, *, autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP, **kwargs: Any
    ):
        if num_envs < 1:
            raise LedeError(f"num_envs={num_envs} must be at least 1")
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self._mdp = make_exit_mdp(ExitConfig.parse(kwargs), lanes=num_envs)
        self.single_observation_space = self._mdp.observation_space
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._table = self._mdp.backend
        self.prompt_ids = self._table.prompt_ids
        self.features = self._mdp.features
        self.attributes = self._mdp.attributes
        self._lanes = np.arange(num_envs)
        self._layers = np.array(self._mdp.candidate_layers)
        self._names = np.array(self.prompt_ids, dtype=object)
        self._keys = seeding.np_random(None)[0].integers(2**64, size=num_envs, dtype=np.uint64)  # until seeded
        self._texts = np.zeros(num_envs, np.uint64)  # texts begun since the key was drawn
        self._begun = False  # no reset yet
        self._prompt_id = np.full(num_envs, self.prompt_ids[0], dtype=object)  # replaced, not written: infos hold it
        self._token = np.zeros(num_envs, np.int64)
        self._candidate = np.zeros(num_envs, np.int64)
        self._prompt_over = np.ones(num_envs, bool)  # the next reset begins a prompt, whatever `episode` says
        self._over = np.ones(num_envs, bool)  # the episode ended and was not reset
        self._blank = np.ones(num_envs, bool)  # the text ended (or never began): there is no observation

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        mask, chosen = self._checked_options(options or {})
        seeds = self._checked_seeds(seed)
        lanes = np.flatnonzero(mask)
        for lane in lanes.tolist():
            if seeds[lane] is not None:
                self._keys[lane], self._texts[lane] = draw_key(seeding.np_random(seeds[lane])[0]), 0
                self._prompt_over[lane] = True
        self._prompt_over |= mask & (chosen >= 0)
        self._begin(lanes, chosen)
        self._begun = True
        nobody = np.zeros(self.num_envs, bool)
        return self._observations(), self._infos() | self._outcome(np.full(self.num_envs, CONTINUE), nobody)

    def _checked_options(self, options: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Which sequences to reset (N,), and the index of each one's prompt, -1 where it is to be drawn."""
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs, bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != bool or not mask.any():
            raise LedeError(f"reset_mask must be {self.num_envs} booleans, at least one true; got {mask!r}")
        names = options.get("prompt_ids", [None] * self.num_envs)
        if isinstance(names, str) or len(names) != self.num_envs:
            raise LedeError(f"prompt_ids must be a list of {self.num_envs} prompts, one an environment; got {names!r}")
        return mask, np.array([-1 if name is None else prompt_index(self.prompt_ids, name) for name in names])

    def _checked_seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        """One seed each; an int s stands for s, s + 1, ..."""
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + lane for lane in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise LedeError(f"seed lists {len(seed)} seeds for {self.num_envs} environments; give one each")
        return [None if each is None else int(each) for each in seed]

    def _begin(self, lanes: np.ndarray, chosen: np.ndarray | None = None) -> None:
        """Start the lanes' next episodes, on new prompts but where token episodes are to go on with the old one."""
        new = lanes[self._prompt_over[lanes]] if self._mdp.token_episodes else lanes
        prompts, draw_seeds = draw_texts(len(self.prompt_ids), self._keys[new], self._texts[new])
        if chosen is not None:
            prompts = np.where(chosen[new] < 0, prompts, chosen[new])
        self._table.start_many(new, prompts, draw_seeds)
        self._prompt_id = self._prompt_id.copy()
        self._prompt_id[new] = self._names[prompts]
        self._texts[new] += 1
        self._token[new] = 0
        self._candidate[lanes] = 0
        self._prompt_over[lanes] = self._over[lanes] = self._blank[lanes] = False

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or ((actions != CONTINUE) & (actions != EXIT)).any():
            raise LedeError(f"actions must be {self.num_envs} values out of 0 (continue) and 1 (exit), got {actions!r}")
        if not self._begun:
            raise LedeError("step() before reset(); call reset() first")
        asleep = self._over.copy()  # `_begin` writes into it
        awake = ~asleep
        if self.autoreset_mode is not AutoresetMode.DISABLED and asleep.any():  # reset by this step, action ignored
            self._begin(np.flatnonzero(asleep))
        outcome = self._outcome(actions, awake)
        terms = outcome["reward_terms"]
        rewards = terms["accepted"] + terms["rejected"] + terms["continue"]
        terminated, truncated = self._advance(outcome["_exit_layer"], awake)
        self._over = terminated | truncated
        if self.autoreset_mode is AutoresetMode.DISABLED:
            self._over |= asleep
        observations = self._observations()
        if self.autoreset_mode is AutoresetMode.SAME_STEP and self._over.any():
            ended = self._over
            final = {"final_obs": observations, "final_info": self._infos() | outcome}
            outcome = outcome | _masked(final, ended)
            self._over = np.zeros(self.num_envs, bool)
            lanes = np.flatnonzero(ended)
            self._begin(lanes)
            observations = observations.copy()
            observations[lanes] = self._observations(lanes)
        return observations, rewards, terminated, truncated, self._infos() | outcome

    def _outcome(self, actions: np.ndarray, awake: np.ndarray) -> dict[str, Any]:
        """Info of the actions of the lanes that are awake; for the others, that of a reset."""
        table, reward, candidate = self._table, self._mdp.reward, self._candidate
        row, cell = self._places(ALL)
        last = candidate == len(self._layers) - 1
        exits = ((actions == EXIT) | last) & awake
        right = exits & table.accepted.reshape(-1).take(cell, mode="clip")
        terms = {
            "accepted": np.where(right, reward.accepted.take(candidate), 0.0),
            "rejected": np.where(exits & ~right, reward.rejected, 0.0),
            "continue": np.where(awake & ~exits, reward.continue_, 0.0),
        }
        everyone = np.ones(self.num_envs, bool)
        of_action = {
            "cost": self._mdp.step_cost.take(candidate) * awake,
            "discount": np.where(exits, 0.0, 1.0),
            "forced": exits & (actions != EXIT),
            "reward_terms": _masked(terms, everyone),
        }
        of_exit = {
            "exit_layer": np.where(exits, self._layers.take(candidate), -1),
            "draft_token": np.where(exits, table.drafts.reshape(-1).take(cell, mode="clip"), -1),
            "target_token": np.where(exits, table.targets.take(row, mode="clip"), -1),
            "accepted": right,
        }
        return _masked(of_action, everyone) | _masked(of_exit, exits)

    def _advance(self, exits: np.ndarray, awake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Move every lane on by its action; returns terminated and truncated, (N,) each."""
        ended = exits & self._table.ends.take(self._table.base + self._token, mode="clip")
        truncated = exits & ~ended & (self._token + 1 == self._mdp.max_new_tokens)
        self._prompt_over |= ended | truncated
        self._blank |= ended
        self._token = self._token + exits
        self._candidate = np.where(exits, 0, self._candidate + awake)
        return (exits & ~truncated) if self._mdp.token_episodes else ended, truncated

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
        return _masked(info, np.ones(self.num_envs, bool))


def _masked(info: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
    """The info with Gymnasium's mask `_key` beside each key: which environments have it."""
    return info | {f"_{key}": mask for key in info}
