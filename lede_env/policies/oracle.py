"""The clairvoyant optimum as an actor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class Oracle:
    """The clairvoyant optimum of an environment on a trace: it knows what every decision will lead to.

    No `ExitPolicy`, which decides by what it observes: it looks into the environment it plays, and is an upper bound
    for policies, not one of them. Wherever it is put, what it does from there on is optimal.

        oracle = Oracle(env)
        observation, info = env.reset()
        observation, reward, terminated, truncated, info = env.step(oracle.act(info))

    A vector environment's infos give its actions, (N,). It belongs to that one environment, forks not included. The
    optimum is of the undiscounted return over a prompt.

    Raises:
        LedeError: the environment is not one on a trace.
    """

    def __init__(self, env: Any):
        from lede_env.oracles import tabulate

        self._table = tabulate(env)
        self._exits = self._table.optimum()

    def act(self, info: Mapping[str, Any]) -> Any:
        """The action where the environment stands, by the info of its last reset or step."""
        actions = self._exits[self._table.place(info)].astype(np.int64)
        return actions if np.ndim(info["token_index"]) else actions[0]
