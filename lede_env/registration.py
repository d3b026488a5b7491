"""The one table of environment ids. After a release, changing a pinned value means a new -vN.

`LEDE-<model>-v0` is the exit MDP, `LEDE-<model>-Draft-v0` the draft MDP, and `-Twin` after the model its geometry twin.
Every pinned value is an argument of `gym.make`; other temperatures are arguments, not ids. With `backend="trace"` and
no `trace`, an id plays the shipped trace of its model at its temperature (`lede_env.data.registry`).

Episodes end by themselves: `max_new_tokens` truncates them. So no spec has `max_episode_steps`: it would put a
`TimeLimit` in steps around every environment, which `max_new_tokens`, an argument, could not move. The
`reward_threshold` of an id is what is known to be within reach of a policy that only observes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

import gymnasium as gym

from lede_env.envs.draft_config import DraftConfig
from lede_env.envs.exit_config import ExitConfig
from lede_env.errors import LedeError
from lede_env.models.zoo import MODELS

# Zoo name -> its name in ids, the cost model, and rho of the draft MDP: the rate, in tokens per autoregressive step,
# of the best static setting on the training prompts, greedy, by that cost model (a test recomputes it). The acceptance
# behind all of them is the embedded model's, as it is in every twin.
_MODELS: dict[str, tuple[str, str, float]] = {
    "tiny": ("Tiny", "tiny-cpu", 1.981),
    "llama3.2-1b": ("Llama3.2-1B", "llama3.2-1b-h200", 1.660),
    "llama2-7b": ("Llama2-7B", "llama2-7b-h200", 2.276),
    "llama2-13b": ("Llama2-13B", "llama2-13b-h200", 2.199),
    "codellama-7b": ("CodeLlama-7B", "codellama-7b-h200", 2.136),
    "codellama-34b": ("CodeLlama-34B", "codellama-34b-h200", 2.309),
}


# Mean return over the test prompts (`split="test"`) of the observation-limited reference, trees that learned from the
# training prompts with full information: python -m agents.reference_trees --env-id ID. A slow test recomputes it.
# Twins play the embedded model's trace, at their own depths; of the real weights nobody here has a trace.
_SAME = ("Tiny", "Llama3.2-1B-Twin", "Llama2-7B-Twin", "CodeLlama-7B-Twin", "CodeLlama-34B-Twin")
_THRESHOLDS = {
    **{f"LEDE-{label}-v0": 177.2 for label in _SAME},
    **{f"LEDE-{label}-Draft-v0": 150.3 for label in _SAME},
    "LEDE-Llama2-13B-Twin-v0": 176.0,  # whose 40 layers the candidates divide otherwise
    "LEDE-Llama2-13B-Twin-Draft-v0": 149.3,
}


def extended_for(env_id: str, reads: Iterable[str]) -> str | tuple[str, ...]:
    """What `features` to make an environment with, so that it shows all of v0; on a draft MDP those of the acceptance
    head too, where `reads` names one of them."""
    from lede_env.engine.signals import KNOWN_FEATURES, asks_head

    draft = env_id in gym.registry and "draft" in str(gym.registry[env_id].entry_point)
    return KNOWN_FEATURES["draft"] if draft and asks_head(reads) else "extended"


def _table() -> dict[str, ExitConfig]:
    """Environment id -> every value it pins."""
    table: dict[str, ExitConfig] = {}
    for model, (label, cost_model, rho) in _MODELS.items():
        for twin in ("", "-Twin") if MODELS[model].hub_id else ("",):
            candidates, weights = MODELS[model].candidate_layers, "twin" if twin else "auto"
            table[f"LEDE-{label}{twin}-v0"] = ExitConfig(
                model=model, candidate_layers=candidates, cost_model=cost_model, weights=weights
            )
            table[f"LEDE-{label}{twin}-Draft-v0"] = DraftConfig(
                model=model, candidate_layers=candidates, cost_model=cost_model, weights=weights, rho=rho
            )
    return table


ENVIRONMENTS = _table()


def pinned(env_id: str) -> ExitConfig:
    """The arguments an id pins; a `DraftConfig` is the draft MDP's."""
    if env_id not in ENVIRONMENTS:
        raise LedeError(f"environment {env_id!r} is unknown; known ids: {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[env_id]


def mdp_of(config: ExitConfig) -> str:
    """ "exit" or "draft"."""
    return "draft" if isinstance(config, DraftConfig) else "exit"


def ids_of(model: str, weights: str) -> list[str]:
    """The ids of a model of the zoo with its own weights ("auto") or as a "twin"."""
    return [name for name, config in ENVIRONMENTS.items() if (config.model, config.weights) == (model, weights)]


def register_all() -> None:
    """Register every id with Gymnasium; doing it twice is harmless."""
    for env_id, config in ENVIRONMENTS.items():
        if env_id not in gym.registry:
            mdp = mdp_of(config)
            gym.register(
                id=env_id,
                entry_point=f"lede_env.envs.{mdp}_env:Speculative{mdp.title()}Env",
                vector_entry_point=f"lede_env.envs.{mdp}_vector_env:Speculative{mdp.title()}VectorEnv",
                kwargs=asdict(config),
                reward_threshold=_THRESHOLDS.get(env_id),
                disable_env_checker=True,  # it would re-check every step; the tests run check_env
                order_enforce=False,  # the environment checks for itself, with a clearer message
            )
