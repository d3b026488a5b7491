"""What the single and the vector form of the exit MDP share: the configuration, resolved and checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from lede_env.engine.acceptance import Sampling
from lede_env.engine.cost_model import load_cost_model
from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.signals import feature_bounds, select_features
from lede_env.envs.backends import LiveBackend
from lede_env.envs.exit_config import ExitConfig
from lede_env.envs.rewards import ExitReward, make_exit_reward
from lede_env.errors import LedeError
from lede_env.models.loading import load_model
from lede_env.tasks import load_prompts


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

    def prompt_index(self, prompt_id: str) -> int:
        """Where a prompt is among those of the backend."""
        known = self.backend.prompt_ids
        if prompt_id not in known:
            raise LedeError(
                f"prompt_id {prompt_id!r} is not among the {len(known)} prompts of this environment "
                f"(the first is {known[0]!r}); check task and split"
            )
        return known.index(prompt_id)

    def choose_prompt(self, rng: np.random.Generator, chosen: int | None) -> tuple[int, int]:
        """Index of the chosen prompt, or of one drawn; and the seed of its draws. Both numbers are always drawn."""
        prompt, draw_seed = int(rng.integers(len(self.backend.prompt_ids))), int(rng.integers(2**63))
        return (prompt if chosen is None else chosen), draw_seed


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
    layers = tuple(int(layer) for layer in config.candidate_layers)
    for layer in layers:
        lm.check_exit_layer(layer)
    if not layers or list(layers) != sorted(set(layers)):
        raise LedeError(f"candidate_layers={layers} must be ascending and distinct, at least one")
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
            load_prompts(config.task, config.split),
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
        attributes=_attributes(config, lm, layers, features),
    )


def _attributes(
    config: ExitConfig, lm: LayeredLM, layers: tuple[int, ...], features: tuple[str, ...]
) -> dict[str, Any]:
    """What defines the MDP; the backend and the device leave no trace in its data."""
    resolved = {
        "mdp": "exit",
        "model_name": lm.name,
        "model_fingerprint": lm.fingerprint,
        "n_layers": lm.n_layers,
        "candidate_layers": list(layers),
        "features": list(features),
        "reward_kwargs": dict(config.reward_kwargs),
        "dtype": str(lm.dtype).removeprefix("torch."),
    }
    pinned = {name: value for name, value in asdict(config).items() if name not in ("model", "backend", "device")}
    return pinned | resolved
