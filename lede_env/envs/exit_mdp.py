"""What the single and the vector form of the exit MDP share: the pinned values, resolved and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from lede_env.engine.acceptance import Sampling
from lede_env.engine.cost_model import load_cost_model
from lede_env.engine.signals import feature_bounds, select_features
from lede_env.envs.backends import LiveBackend, open_prompts
from lede_env.envs.rewards import ExitReward, make_exit_reward
from lede_env.errors import LedeError
from lede_env.models.loading import load_model


@dataclass(frozen=True)
class ExitMDP:
    """A resolved exit MDP. `step_cost[c]` is the modelled cost of reaching candidate c from the one before it."""

    backend: LiveBackend
    n_layers: int
    candidate_layers: tuple[int, ...]
    features: tuple[str, ...]
    reward: ExitReward
    step_cost: np.ndarray  # (C,) autoregressive steps
    max_new_tokens: int
    token_episodes: bool
    observation_space: spaces.Box
    attributes: dict[str, Any]  # everything that defines the MDP, JSON-able

    def choose_prompt(self, rng: np.random.Generator, prompt_id: str | None) -> tuple[int, int]:
        """Index of the prompt named, or of one drawn; and the seed of its draws. Both numbers are always drawn."""
        prompt, draw_seed = int(rng.integers(len(self.backend.prompt_ids))), int(rng.integers(2**63))
        if prompt_id is None:
            return prompt, draw_seed
        if prompt_id not in self.backend.prompt_ids:
            raise LedeError(
                f"prompt_id {prompt_id!r} is not among the {len(self.backend.prompt_ids)} prompts of this environment "
                f"(the first is {self.backend.prompt_ids[0]!r}); check task and split"
            )
        return self.backend.prompt_ids.index(prompt_id), draw_seed


def make_exit_mdp(
    lanes: int,
    *,
    model: str,
    candidate_layers: Sequence[int],
    backend: str,
    task: str,
    split: str,
    features: str | Sequence[str],
    reward: str,
    reward_kwargs: Mapping[str, float],
    cost_model: str,
    temperature: float,
    top_k: int,
    top_p: float,
    max_new_tokens: int,
    episode: str,
    device: str,
    dtype: str | None,
) -> ExitMDP:
    """Check every argument of the exit environments and build the backend for `lanes` sequences."""
    if backend != "live":
        raise LedeError(f"backend={backend!r} is unknown; use 'live'")
    if episode not in ("prompt", "token"):
        raise LedeError(f"episode={episode!r} is unknown; use 'prompt' or 'token'")
    if max_new_tokens < 1:
        raise LedeError(f"max_new_tokens={max_new_tokens} must be at least 1")
    names = select_features(features, "exit")
    lm = load_model(model, device=device, dtype=dtype)
    layers = tuple(int(layer) for layer in candidate_layers)
    for layer in layers:
        lm.check_exit_layer(layer)
    if not layers or list(layers) != sorted(set(layers)):
        raise LedeError(f"candidate_layers={layers} must be ascending and distinct, at least one")
    costs = load_cost_model(cost_model)
    low, high = feature_bounds(names, lm.geometry.vocab)
    source = LiveBackend(
        lm,
        open_prompts(task, split),
        lanes,
        max_new_tokens,
        Sampling(temperature, top_k, top_p),
        layers,
        names,
    )
    return ExitMDP(
        backend=source,
        n_layers=lm.n_layers,
        candidate_layers=layers,
        features=names,
        reward=make_exit_reward(reward, reward_kwargs, layers, lm.n_layers),
        step_cost=np.array([costs.walk(gap, 1, 1) for gap in np.diff((0, *layers)).tolist()]),
        max_new_tokens=max_new_tokens,
        token_episodes=episode == "token",
        observation_space=spaces.Box(low, high, dtype=np.float32),
        attributes={
            "mdp": "exit",
            "model_name": lm.name,
            "model_fingerprint": lm.fingerprint,
            "n_layers": lm.n_layers,
            "candidate_layers": list(layers),
            "task": task,
            "split": split,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "features": list(names),
            "reward": reward,
            "reward_kwargs": dict(reward_kwargs),
            "cost_model": cost_model,
            "episode": episode,
            "dtype": str(lm.dtype).removeprefix("torch."),
        },
    )
