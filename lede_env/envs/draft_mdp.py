"""What the single and the vector form of the draft MDP share: the configuration, resolved and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from lede_env.data.trace_file import load_trace, text_digest
from lede_env.digest import digest
from lede_env.engine.acceptance import Sampling
from lede_env.engine.cost_model import CostModel, load_cost_model
from lede_env.engine.round import DRAFT_CAP
from lede_env.engine.signals import feature_bounds, select_features
from lede_env.envs.draft_config import DraftConfig
from lede_env.envs.draft_live import DraftLiveBackend
from lede_env.envs.draft_trace import DraftTraceBackend
from lede_env.envs.exit_mdp import _checked_layers
from lede_env.envs.rewards import DraftReward, make_draft_reward
from lede_env.errors import LedeError
from lede_env.models.loading import load_model
from lede_env.tasks import load_prompts


@dataclass(frozen=True)
class DraftMDP:
    """A resolved draft MDP. `costs[c, d]` is the modelled cost of a round with d drafts at candidate c, after a check
    at every candidate before it; each decision adds `decision_cost`."""

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


@dataclass(frozen=True)
class _Source:
    """What the rest needs to know of the model and the prompts, wherever they come from."""

    backend: DraftLiveBackend | DraftTraceBackend
    model: dict[str, Any]  # as the attributes name it
    vocab: int
    prompts: list[tuple[str, str, str]]  # id, task, digest of the text

    @property
    def n_layers(self) -> int:
        return self.model["n_layers"]

    @property
    def layers(self) -> tuple[int, ...]:
        return self.backend.candidate_layers


def make_draft_mdp(config: DraftConfig, lanes: int) -> DraftMDP:
    """Check every argument of the draft environments and build the backend for `lanes` sequences."""
    sources = {"live": _live, "trace": _trace}
    if config.backend not in sources:
        raise LedeError(f"backend={config.backend!r} is unknown; use 'live' or 'trace'")
    if config.episode not in ("prompt", "round"):
        raise LedeError(f"episode={config.episode!r} is unknown; use 'prompt' or 'round'")
    if not isinstance(config.max_new_tokens, int) or config.max_new_tokens < 2:
        raise LedeError(
            f"max_new_tokens={config.max_new_tokens!r} must be a whole number, at least 2: "
            "with one token left there is nothing to draft"
        )
    if not isinstance(config.cap, int) or not 1 <= config.cap <= DRAFT_CAP:
        raise LedeError(f"cap={config.cap!r} must be a whole number of drafts a round, 1 to {DRAFT_CAP}")
    features = select_features(config.features, "draft")
    source = sources[config.backend](config, features, lanes)
    if len(source.layers) < 2:
        raise LedeError(f"candidate_layers={source.layers} leave no choice; the draft MDP needs at least two")
    costs = load_cost_model(config.cost_model)
    if costs.n_layers != source.n_layers:
        raise LedeError(
            f"cost_model={config.cost_model!r} was measured on {costs.model}, of {costs.n_layers} layers, but "
            f"{source.model['model_name']} has {source.n_layers}; measure one with "
            f"python -m lede_env.engine.cost_model --model {source.model['model_name']}"
        )
    low, high = feature_bounds(features, source.vocab)
    return DraftMDP(
        backend=source.backend,
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
        attributes=_attributes(config, source, features, costs),
    )


def _live(config: DraftConfig, features: tuple[str, ...], lanes: int) -> _Source:
    lm = load_model(config.model, device=config.device, dtype=config.dtype)
    layers = _checked_layers(config.candidate_layers, lm)
    prompts = load_prompts(config.task, config.split)
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    backend = DraftLiveBackend(lm, prompts, lanes, config.max_new_tokens, sampling, layers, features, config.cap)
    model = {
        "model_name": lm.name,
        "model_fingerprint": lm.fingerprint,
        "n_layers": lm.n_layers,
        "dtype": str(lm.dtype).removeprefix("torch."),
    }
    return _Source(backend, model, lm.geometry.vocab, [(p.id, p.task, text_digest(p.text)) for p in prompts])


def _trace(config: DraftConfig, features: tuple[str, ...], lanes: int) -> _Source:
    if config.trace is None:
        raise LedeError("backend='trace' needs a trace; pass trace=FILE, or backend='live'")
    trace = load_trace(config.trace)
    header = trace.header
    prompt_ids = trace.prompts_of(config.task, config.split)
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    backend = DraftTraceBackend(
        trace, prompt_ids, lanes, config.max_new_tokens, sampling, config.candidate_layers, features, config.cap
    )
    model = {name: getattr(header, name) for name in ("model_name", "model_fingerprint", "n_layers", "dtype")}
    table = {row[0]: row for row in zip(trace.prompt_ids, trace.prompt_tasks, trace.prompt_digests, strict=True)}
    return _Source(backend, model, header.vocab, [table[prompt_id] for prompt_id in prompt_ids])


def _round_costs(costs: CostModel, layers: Sequence[int], cap: int) -> np.ndarray:
    """(C, cap + 1): `DraftMDP.costs`."""
    return np.array(
        [
            [costs.round(layer, drafts, checks=index, decisions=0) for drafts in range(cap + 1)]
            for index, layer in enumerate(layers)
        ]
    )


def _attributes(config: DraftConfig, source: _Source, features: tuple[str, ...], costs: CostModel) -> dict[str, Any]:
    """What defines the MDP; the backend and the device leave no trace in its data.

    Names of files and of cost models say nothing of their content: digests do.
    """
    resolved = {
        "mdp": "draft",
        **source.model,
        "candidate_layers": list(source.layers),
        "features": list(features),
        "reward_kwargs": dict(config.reward_kwargs),
        "prompts_digest": digest(source.prompts),
        "cost_model_digest": digest(asdict(costs)),
    }
    aside = ("model", "backend", "device", "trace")
    return {name: value for name, value in asdict(config).items() if name not in aside} | resolved
