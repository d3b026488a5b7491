"""Modelled time: what a round costs on a named device, from a JSON of measured kernels.

`lede_env.cost_measurement` writes one. A shipped one never changes: rewards and scores of released ids depend on it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lede_env.engine.round import Round
from lede_env.errors import LedeError

SHIPPED = Path(__file__).parent / "cost_models"


@dataclass(frozen=True)
class CostModel:
    """Seconds of each piece of a round. Widths are rows: index w is a pass over w tokens (index 0 is unused)."""

    name: str
    model: str
    weights: str  # "embedded", "checkpoint", "twin" or "random": what was run
    device: str
    dtype: str
    n_layers: int
    layer: tuple[float, ...]  # one layer
    head: tuple[float, ...]  # final norm, LM head and the most probable token
    decision: float  # what it adds to a draft: signals, features and the policy's answer
    context: int  # positions in the cache while measuring
    software: str

    @property
    def step(self) -> float:
        """Seconds of one autoregressive step: the unit of every cost."""
        return self.n_layers * self.layer[1] + self.head[1]

    def walk(self, layers: int, heads: int, decisions: int) -> float:
        """Cost, in autoregressive steps, of running one token through `layers` with `heads` exit checks."""
        return (layers * self.layer[1] + heads * self.head[1] + decisions * self.decision) / self.step

    def round(self, exit_layer: int, drafts: int, checks: int, decisions: int, bonus: bool = True) -> float:
        """Cost, in autoregressive steps, of a round that drafts at one layer (design section 3).

        (d + 1) e t_layer + (L - e) t_layer(d + 1) + (d + checks) t_head + t_head(d + 1) + decisions t_decision; d for
        d + 1 without the slot for the bonus token.
        """
        slots = drafts + bonus
        seconds = (
            slots * exit_layer * self.layer[1]
            + (self.n_layers - exit_layer) * _at(self.layer, slots)
            + (drafts + checks) * self.head[1]
            + _at(self.head, slots)
            + decisions * self.decision
        )
        return seconds / self.step

    def of(self, round_: Round) -> float:
        """Cost, in autoregressive steps, of a round as it was played, its drafts from whatever layers.

        The slots of the round go through the layers as a session moves them: one that waits below rides along. Equals
        `round` where all drafts left one layer, and the round was not cut by the end of the text.
        """
        seconds, depths = 0.0, [0]
        goals = (*round_.exits, self.n_layers)
        for number, goal in enumerate(goals, 1):
            if number == len(goals) and not round_.bonus:
                depths.pop()  # the last draft runs through no layer
            while depths[-1] < goal:
                here = depths[-1]
                there = min(goal, min((depth for depth in depths if depth > here), default=goal))
                seconds += (there - here) * _at(self.layer, depths.count(here))
                depths = [there if depth == here else depth for depth in depths]
            depths.append(0)
        heads = len(round_.exits) + round_.checks
        seconds += (
            heads * self.head[1] + _at(self.head, len(round_.exits) + round_.bonus) + round_.decisions * self.decision
        )
        if round_.studied:
            seconds += _at(self.head, round_.studied)
        return seconds / self.step


def _at(seconds: Sequence[float], width: int) -> float:
    """Entry of a width; wider passes than were measured cost in proportion."""
    widest = len(seconds) - 1
    return seconds[width] if width <= widest else seconds[widest] * width / widest


def load_cost_model(name: str) -> CostModel:
    """A shipped cost model by name, or one from a JSON file's path."""
    path = SHIPPED / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.json")))
        raise LedeError(f"cost model {name!r} is unknown; shipped: {shipped}; or give the path of a JSON file")
    try:
        values = json.loads(path.read_text())
        costs = CostModel(**{**values, "layer": tuple(values["layer"]), "head": tuple(values["head"])})
        if len(costs.layer) < 2 or len(costs.head) < 2:
            raise ValueError("layer and head need an entry of one row")
        if not all(0 <= seconds < math.inf for seconds in (*costs.layer, *costs.head, costs.decision)):
            raise ValueError("seconds must be numbers, at least 0")
        if not costs.layer[1]:
            raise ValueError("a layer takes no time")
        return costs
    except (ValueError, TypeError, KeyError) as error:
        raise LedeError(
            f"{path} is not a cost model ({error}); write one with python -m lede_env.cost_measurement"
        ) from error
