"""What the single and the vector form of the exit MDP share: the configuration, resolved and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from lede_env.engine.signals import feature_bounds, select_features
from lede_env.envs.backends import LiveBackend
from lede_env.envs.exit_config import ExitConfig
from lede_env.envs.rewards import ExitReward, make_exit_reward
from lede_env.envs.source import Source, attributes_of, find_costs, find_source
from lede_env.envs.trace_backend import TraceBackend
from lede_env.errors import LedeError


@dataclass(frozen=True)
class ExitMDP:
    """A resolved exit MDP. `step_cost[c]` is the modelled cost of reaching candidate c from the one before it."""

    source: Source  # first: it refuses to be pickled where the rest cannot be
    backend: LiveBackend | TraceBackend
    n_layers: int
    candidate_layers: tuple[int, ...]
    features: tuple[str, ...]
    reward: ExitReward
    step_cost: np.ndarray  # (C,) autoregressive steps
    max_new_tokens: int
    token_episodes: bool
    observation_space: spaces.Box
    attributes: dict[str, Any]  # everything that defines the MDP, JSON-able


def make_exit_mdp(config: ExitConfig, lanes: int) -> ExitMDP:
    """Check every argument of the exit environments and build the backend for `lanes` sequences."""
    if config.episode not in ("prompt", "token"):
        raise LedeError(f"episode={config.episode!r} is unknown; use 'prompt' or 'token'")
    if config.max_new_tokens < 1:
        raise LedeError(f"max_new_tokens={config.max_new_tokens} must be at least 1")
    features = select_features(config.features, "exit")
    source = find_source(config)
    costs = find_costs(config, source)
    backend: Any = {"live": LiveBackend, "trace": TraceBackend}[config.backend]
    low, high = feature_bounds(features, source.vocab)
    return ExitMDP(
        source=source,
        backend=backend(
            source.origin, source.prompts, lanes, config.max_new_tokens, source.sampling, source.layers, features
        ),
        n_layers=source.n_layers,
        candidate_layers=source.layers,
        features=features,
        reward=make_exit_reward(config.reward, config.reward_kwargs, source.layers, source.n_layers),
        step_cost=np.array([costs.walk(gap, 1, 1) for gap in np.diff((0, *source.layers)).tolist()]),
        max_new_tokens=config.max_new_tokens,
        token_episodes=config.episode == "token",
        observation_space=spaces.Box(low, high, dtype=np.float32),
        attributes=attributes_of("exit", config, source, features, costs),
    )
