"""The exit MDP for many sequences at once: one forward of the language model serves all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from lede_env.envs.exit_mdp import make_exit_mdp
from lede_env.errors import LedeError
from lede_env.policies import EXIT


class SpeculativeExitVectorEnv(VectorEnv):
    """`gym.make_vec("LEDE-Tiny-v0", num_envs=N)`: N `SpeculativeExitEnv`s whose results do not depend on N.

    `autoreset_mode` is SAME_STEP by default; NEXT_STEP and DISABLED (with `reset(options={"reset_mask": ...})`) work
    as in Gymnasium. `reset(options={"prompt_ids": [...]})` chooses the prompts, one a sequence. Infos are arrays:
    every key of the single environment, with a mask `_key`; the final ones of an episode under `final_info`.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        model: str,
        candidate_layers: Sequence[int],
        backend: str = "live",
        task: str = "all",
        split: str = "train",
        features: str | Sequence[str] = "paper",
        reward: str = "paper",
        reward_kwargs: Mapping[str, float] | None = None,
        cost_model: str,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_new_tokens: int = 128,
        episode: str = "prompt",
        device: str = "auto",
        dtype: str | None = None,
    ):
        if num_envs < 1:
            raise LedeError(f"num_envs={num_envs} must be at least 1")
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self._mdp = make_exit_mdp(
            num_envs,
            model=model,
            candidate_layers=candidate_layers,
            backend=backend,
            task=task,
            split=split,
            features=features,
            reward=reward,
            reward_kwargs=reward_kwargs or {},
            cost_model=cost_model,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            episode=episode,
            device=device,
            dtype=dtype,
        )
        self.single_observation_space = self._mdp.observation_space
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._table = self._mdp.backend
        self.prompt_ids = self._table.prompt_ids
        self.features = self._mdp.features
        self.attributes = self._mdp.attributes
        self._layers = np.array(self._mdp.candidate_layers)
        self._names = np.array(self.prompt_ids, dtype=object)
        self._rngs: list[np.random.Generator] = []
        self._prompt = np.zeros(num_envs, np.int64)
        self._token = np.zeros(num_envs, np.int64)
        self._candidate = np.zeros(num_envs, np.int64)
        self._prompt_over = np.ones(num_envs, bool)
        self._over = np.ones(num_envs, bool)  # the episode ended and was not reset
        self._blank = np.zeros(num_envs, bool)  # the text ended: there is no next observation

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        options = dict(options or {})
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs, bool)))
        chosen = options.get("prompt_ids", [None] * self.num_envs)
        if mask.shape != (self.num_envs,) or mask.dtype != bool or not mask.any():
            raise LedeError(f"reset_mask must be {self.num_envs} booleans, at least one true; got {mask!r}")
        if len(chosen) != self.num_envs:
            raise LedeError(f"prompt_ids names {len(chosen)} prompts for {self.num_envs} sequences; give one each")
        seeds = (
            list(seed)
            if isinstance(seed, Sequence)
            else [seed + i if seed is not None else None for i in range(self.num_envs)]
        )
        if len(seeds) != self.num_envs:
            raise LedeError(f"seed lists {len(seeds)} seeds for {self.num_envs} sequences; give one each")
        if not self._rngs:
            self._rngs = [seeding.np_random(None)[0] for _ in range(self.num_envs)]
        for lane in np.flatnonzero(mask).tolist():
            if seeds[lane] is not None:
                self._rngs[lane] = seeding.np_random(seeds[lane])[0]
            self._begin(lane, chosen[lane], fresh=seeds[lane] is not None or chosen[lane] is not None)
        blank = np.zeros(self.num_envs)
        info = {"cost": blank, "discount": blank + 1.0, "forced": blank.astype(bool)}
        return self._observations(), self._infos() | info

    def _begin(self, lane: int, prompt_id: str | None = None, fresh: bool = False) -> None:
        """Start the lane's next episode."""
        if self._prompt_over[lane] or not self._mdp.token_episodes or fresh:
            self._prompt[lane], draw_seed = self._mdp.choose_prompt(self._rngs[lane], prompt_id)
            self._table.start(lane, int(self._prompt[lane]), draw_seed)
            self._token[lane] = 0
        self._candidate[lane] = 0
        self._prompt_over[lane] = self._over[lane] = self._blank[lane] = False

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or ((actions != 0) & (actions != 1)).any():
            raise LedeError(f"actions must be {self.num_envs} values out of 0 (continue) and 1 (exit), got {actions!r}")
        if not self._rngs:
            raise LedeError("step() before reset(); call reset() first")
        waking = self._over.copy()  # NEXT_STEP: these sequences are reset by this step, their action ignored
        if waking.any():
            if self.autoreset_mode is AutoresetMode.DISABLED:
                raise LedeError("step() after an episode ended; reset it with options={'reset_mask': ...} first")
            for lane in np.flatnonzero(waking).tolist():
                self._begin(lane)
        rewards, terminated, truncated, action_info = self._act(actions, ~waking)
        over = terminated | truncated
        if self.autoreset_mode is not AutoresetMode.SAME_STEP or not over.any():
            self._over = over
            return self._observations(), rewards, terminated, truncated, self._infos() | action_info
        final = {
            "final_obs": self._observations(),
            "_final_obs": over,
            "final_info": self._infos() | action_info,
            "_final_info": over,
        }
        for lane in np.flatnonzero(over).tolist():
            self._begin(lane)
        return self._observations(), rewards, terminated, truncated, self._infos() | action_info | final

    def _act(self, actions: np.ndarray, awake: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Apply the actions of the lanes that are awake; returns rewards, terminated, truncated and their infos."""
        table, reward = self._table, self._mdp.reward
        candidate, row = self._candidate, self._table.base + self._token
        last = candidate == len(self._layers) - 1
        exits = ((actions == EXIT) | last) & awake
        stays = awake & ~exits
        right = exits & table.accepted[row, candidate]
        terms = {
            "accepted": np.where(right, reward.accepted[candidate], 0.0),
            "rejected": np.where(exits & ~right, reward.rejected, 0.0),
            "continue": np.where(stays, reward.continue_, 0.0),
        }
        info = {
            "cost": np.where(awake, self._mdp.step_cost[candidate], 0.0),
            "discount": np.where(exits, 0.0, 1.0),
            "forced": exits & last & (actions != EXIT),
            "reward_terms": terms,
            "exit_layer": self._layers[candidate],
            "draft_token": table.drafts[row, candidate],
            "target_token": table.targets[row],
            "accepted": right,
        }
        # Keys that only an exit has: masked, and blank elsewhere, so that nothing leaks.
        for key in ("exit_layer", "draft_token", "target_token"):
            info[key] = np.where(exits, info[key], -1)
        info |= {f"_{key}": exits for key in ("exit_layer", "draft_token", "target_token", "accepted")}
        ended = exits & table.ends[row]
        truncated = exits & ~ended & (self._token + 1 == self._mdp.max_new_tokens)
        self._prompt_over |= ended | truncated
        terminated = (exits & ~truncated) if self._mdp.token_episodes else ended
        self._blank = ended
        self._token = self._token + exits
        self._candidate = np.where(exits, 0, candidate + stays)
        return terms["accepted"] + terms["rejected"] + terms["continue"], terminated, truncated, info

    def _observations(self) -> np.ndarray:
        """(N, F) float32: where each sequence stands; zeros where its text has ended."""
        behind = self._table.known <= self._token
        for lane in np.flatnonzero(behind & ~self._blank).tolist():
            self._table.ensure(lane, int(self._token[lane]))
        row = self._table.base + np.where(self._blank, 0, self._token)
        observations = self._table.observations[row, self._candidate]
        observations[self._blank] = 0.0
        return observations

    def _infos(self) -> dict[str, Any]:
        """Of the observation returned."""
        everyone = np.ones(self.num_envs, bool)
        info = {
            "prompt_id": self._names[self._prompt],
            "token_index": self._token.copy(),
            "layer": self._layers[self._candidate],
        }
        return info | {f"_{key}": everyone for key in info}
