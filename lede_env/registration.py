"""The one table of environment ids. After a release, changing a pinned value means a new -vN."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import gymnasium as gym

from lede_env.envs.exit_config import ExitConfig
from lede_env.errors import LedeError

# Environment id -> every value it pins.
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "LEDE-Tiny-v0": asdict(ExitConfig(model="tiny", candidate_layers=(3, 4, 6, 8), cost_model="tiny-cpu")),
}


def pinned(env_id: str) -> dict[str, Any]:
    """The arguments an id pins."""
    if env_id not in ENVIRONMENTS:
        raise LedeError(f"environment {env_id!r} is unknown; known ids: {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[env_id]


def register_all() -> None:
    """Register every id with Gymnasium; doing it twice is harmless."""
    for env_id, kwargs in ENVIRONMENTS.items():
        if env_id not in gym.registry:
            gym.register(
                id=env_id,
                entry_point="lede_env.envs.exit_env:SpeculativeExitEnv",
                vector_entry_point="lede_env.envs.exit_vector_env:SpeculativeExitVectorEnv",
                kwargs=kwargs,
                disable_env_checker=True,  # it would re-check every step; the tests run check_env
                order_enforce=False,  # the environment checks for itself, with a clearer message
            )
