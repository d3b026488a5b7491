"""What-if search: copies of an environment in the middle of an episode."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from lede_env.envs.rendering import Screen
from lede_env.envs.trace_backend import TraceBackend
from lede_env.errors import LedeError

Env = TypeVar("Env", bound=Any)


def fork(self: Env) -> Env:
    """An independent environment in the same state: what happens to one has no effect on the other, and the same
    actions bring both the same. Cheap: the trace's arrays are shared, only the state is copied. The copy of an
    environment that renders for people shows nothing.

    Raises:
        LedeError: the environment is live; a language model's caches are not copied.
    """
    table = self._table
    if not isinstance(table, TraceBackend):
        raise LedeError(
            "a live environment cannot be forked: its state is the language model's caches; make it with "
            "backend='trace', whose episodes are the same"
        )
    twin = copy.copy(self)
    for name, value in vars(self).items():
        if isinstance(value, np.ndarray | np.random.Generator | list):
            setattr(twin, name, copy.deepcopy(value) if isinstance(value, np.random.Generator) else value.copy())
    twin._table = copy.copy(table)
    twin._table.base = table.base.copy()
    twin._mdp = replace(self._mdp, backend=twin._table)
    twin.action_space = copy.deepcopy(self.action_space)  # it has a generator of its own
    if self.render_mode == "human":
        twin.render_mode = None
        twin._screen = Screen(None)
    return twin
