"""Scoring settings and policies without decoding again: what a text's acceptance table already decides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lede_env.engine.cost_model import CostModel
from lede_env.engine.round import DRAFT_CAP, draft_limit


@dataclass(frozen=True)
class StaticResult:
    """A fixed exit layer and draft length over some texts: its counts, and its modelled speedup."""

    exit_layer: int
    speculation: int
    rounds: int
    drafted: int
    accepted: int
    tokens: int
    cost: float  # autoregressive steps

    @property
    def speedup(self) -> float:
        """Tokens per autoregressive step's worth of modelled time."""
        return self.tokens / self.cost


def static_result(texts: Iterable[np.ndarray], exit_layer: int, speculation: int, costs: CostModel) -> StaticResult:
    """Play LayerSkip(exit_layer, speculation) on texts by their acceptance alone; exact for greedy decoding.

    Each text is (T,) booleans: whether the draft made at the layer for token t, the text before it being right,
    equals token t. Drafts after a round's first wrong one never matter, so nothing else is needed.
    """
    rounds = drafted = accepted = tokens = 0
    cost = 0.0
    for right in texts:
        place, end = 0, len(right)
        while place < end:
            d = draft_limit(speculation, end - place)
            wrong = np.flatnonzero(~right[place : place + d])
            run = int(wrong[0]) if len(wrong) else d
            rounds, drafted, accepted = rounds + 1, drafted + d, accepted + run
            cost += costs.round(exit_layer, d, checks=0, decisions=0)
            place += run + 1
        tokens += end
    return StaticResult(exit_layer, speculation, rounds, drafted, accepted, tokens, cost)


def best_static(
    accepted: dict[int, list[np.ndarray]], costs: CostModel, lengths: Iterable[int] = range(1, DRAFT_CAP + 1)
) -> tuple[StaticResult, list[StaticResult]]:
    """The static setting of the highest modelled speedup, and the whole grid.

    `accepted[e]` lists the (T,) acceptance of each text at layer e.
    """
    lengths = list(lengths)
    grid = [static_result(texts, layer, d, costs) for layer, texts in accepted.items() for d in lengths]
    return max(grid, key=lambda result: result.speedup), grid
