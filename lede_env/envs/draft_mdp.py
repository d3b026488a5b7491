"""What the single and the vector form of the draft MDP share: the configuration, resolved and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from lede_env.engine.cost_model import CostModel
from lede_env.engine.round import DRAFT_CAP
from lede_env.engine.signals import feature_bounds, select_features
from lede_env.envs.draft_config import DraftConfig
from lede_env.envs.draft_live import DraftLiveBackend
from lede_env.envs.draft_trace import DraftTraceBackend
from lede_env.envs.rewards import DraftReward, make_draft_reward
from lede_env.envs.source import Source, attributes_of, find_costs, find_source
from lede_env.errors import LedeError


@dataclass(frozen=True)
class DraftMDP:
    """A resolved draft MDP. `costs[c, d]` is the modelled cost of a round with d drafts at candidate c, after a check
    at every candidate before it; each decision adds `decision_cost`."""

    source: Source  # first: it refuses to be pickled where the rest cannot be
    backend: DraftLiveBackend | DraftTraceBackend
    n_layers: int
    candidate_layers: tuple[int, ...]
    features: tuple[str, ...]
    reward: DraftReward
    costs: np.ndarray  # (C, cap + 1) autoregressive steps
    decision_cost: float
    plain_cost: float  # of a round without drafts: 1, or nearly
    cap: int
    max_new_tokens: int
    round_episodes: bool
    observation_space: spaces.Box
    attributes: dict[str, Any]  # everything that defines the MDP, JSON-able


def make_draft_mdp(config: DraftConfig, lanes: int) -> DraftMDP:
    """Check every argument of the draft environments and build the backend for `lanes` sequences."""
    if config.episode not in ("prompt", "round"):
        raise LedeError(f"episode={config.episode!r} is unknown; use 'prompt' or 'round'")
    if config.max_new_tokens < 2:
        raise LedeError(
            f"max_new_tokens={config.max_new_tokens} must be at least 2: with one token left there is nothing to draft"
        )
    if not 1 <= config.cap <= DRAFT_CAP:
        raise LedeError(f"cap={config.cap} must be a number of drafts a round, 1 to {DRAFT_CAP}")
    features = select_features(config.features, "draft")
    source = find_source(config)
    if len(source.layers) < 2:
        raise LedeError(f"candidate_layers={source.layers} leave no choice; the draft MDP needs at least two")
    costs = find_costs(config, source)
    backend: Any = {"live": DraftLiveBackend, "trace": DraftTraceBackend}[config.backend]
    settings = (config.max_new_tokens, source.sampling, source.layers, features, config.cap)
    low, high = feature_bounds(features, source.vocab)
    return DraftMDP(
        source=source,
        backend=backend(source.origin, source.prompts, lanes, *settings),
        n_layers=source.n_layers,
        candidate_layers=source.layers,
        features=features,
        reward=make_draft_reward(config.reward, config.reward_kwargs, config.rho, source.layers, source.n_layers),
        costs=_round_costs(costs, source.layers, config.cap),
        decision_cost=costs.walk(0, 0, 1),
        plain_cost=costs.walk(source.n_layers, 1, 0),
        cap=config.cap,
        max_new_tokens=config.max_new_tokens,
        round_episodes=config.episode == "round",
        observation_space=spaces.Box(low, high, dtype=np.float32),
        attributes=attributes_of("draft", config, source, features, costs),
    )


def _round_costs(costs: CostModel, layers: Sequence[int], cap: int) -> np.ndarray:
    """(C, cap + 1): `DraftMDP.costs`."""
    return np.array(
        [
            [costs.round(layer, drafts, checks=index, decisions=0) for drafts in range(cap + 1)]
            for index, layer in enumerate(layers)
        ]
    )
