"""The arguments of the draft environments. Cheap to import: the table of ids is made of them."""

from __future__ import annotations

from dataclasses import dataclass

from lede_env.engine.round import DRAFT_CAP
from lede_env.envs.exit_config import ExitConfig


@dataclass(frozen=True, kw_only=True)
class DraftConfig(ExitConfig):
    """What defines a draft MDP: the arguments of the exit environments, and these.

    `episode` is a "prompt" or one "round" of it; `cost_model` is also what the reward `throughput` pays by.
    """

    cap: int = DRAFT_CAP  # most drafts a round
    rho: float | None = None  # of `throughput`: tokens that an autoregressive step's worth of time must bring
