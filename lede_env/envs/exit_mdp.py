"""What the single and the vector form of the exit MDP share: the configuration, resolved and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

import numpy as np
from gymnasium import spaces

from lede_env.digest import digest
from lede_env.engine.acceptance import Sampling
from lede_env.engine.cost_model import CostModel, load_cost_model
from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.signals import feature_bounds, select_features
from lede_env.envs.backends import LiveBackend
from lede_env.envs.exit_config import ExitConfig
from lede_env.envs.rewards import ExitReward, make_exit_reward
from lede_env.errors import LedeError
from lede_env.models.loading import load_model
from lede_env.tasks import Prompt, load_prompts


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


def make_exit_mdp(config: ExitConfig, lanes: int) -> ExitMDP:
    """Check every argument of the exit environments and build the backend for `lanes` sequences."""
    if config.backend != "live":
        raise LedeError(f"backend={config.backend!r} is unknown; use 'live'")
    if config.episode not in ("prompt", "token"):
        raise LedeError(f"episode={config.episode!r} is unknown; use 'prompt' or 'token'")
    if not isinstance(config.max_new_tokens, int) or config.max_new_tokens < 1:
        raise LedeError(f"max_new_tokens={config.max_new_tokens!r} must be a whole number, at least 1")
    features = select_features(config.features, "exit")
    lm = load_model(config.model, device=config.device, dtype=config.dtype)
    layers = _checked_layers(config.candidate_layers, lm)
    prompts = load_prompts(config.task, config.split)
    costs = load_cost_model(config.cost_model)
    if costs.n_layers != lm.n_layers:
        raise LedeError(
            f"cost_model={config.cost_model!r} was measured on {costs.model}, of {costs.n_layers} layers, but "
            f"{lm.name} has {lm.n_layers}; measure one with python -m lede_env.engine.cost_model --model {lm.name}"
        )
    low, high = feature_bounds(features, lm.geometry.vocab)
    return ExitMDP(
        backend=LiveBackend(
            lm,
            prompts,
            lanes,
            config.max_new_tokens,
            Sampling(config.temperature, config.top_k, config.top_p),
            layers,
            features,
        ),
        n_layers=lm.n_layers,
        candidate_layers=layers,
        features=features,
        reward=make_exit_reward(config.reward, config.reward_kwargs, layers, lm.n_layers),
        step_cost=np.array([costs.walk(gap, 1, 1) for gap in np.diff((0, *layers)).tolist()]),
        max_new_tokens=config.max_new_tokens,
        token_episodes=config.episode == "token",
        observation_space=spaces.Box(low, high, dtype=np.float32),
        attributes=_attributes(config, lm, layers, features, prompts, costs),
    )


def _checked_layers(layers: Sequence[int], lm: LayeredLM) -> tuple[int, ...]:
    if not isinstance(layers, Sequence | np.ndarray) or not all(
        isinstance(layer, Integral) and not isinstance(layer, bool) for layer in layers
    ):
        raise LedeError(f"candidate_layers={layers!r} must list whole numbers; write it as (4, 8)")
    checked = tuple(int(layer) for layer in layers)
    for layer in checked:
        lm.check_exit_layer(layer)
    if not checked or list(checked) != sorted(set(checked)):
        raise LedeError(f"candidate_layers={checked} must be ascending and distinct, at least one")
    return checked


def _attributes(
    config: ExitConfig,
    lm: LayeredLM,
    layers: tuple[int, ...],
    features: tuple[str, ...],
    prompts: Sequence[Prompt],
    costs: CostModel,
) -> dict[str, Any]:
    """What defines the MDP; the backend and the device leave no trace in its data.

    Names of files and of cost models say nothing of their content: digests do.
    """
    resolved = {
        "mdp": "exit",
        "model_name": lm.name,
        "model_fingerprint": lm.fingerprint,
        "n_layers": lm.n_layers,
        "candidate_layers": list(layers),
        "features": list(features),
        "reward_kwargs": dict(config.reward_kwargs),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "prompts_digest": digest([(prompt.id, prompt.task, prompt.text) for prompt in prompts]),
        "cost_model_digest": digest(asdict(costs)),
    }
    pinned = {name: value for name, value in asdict(config).items() if name not in ("model", "backend", "device")}
    return pinned | resolved
