"""LayerSkip's self-speculative decoding: a fixed exit layer and a fixed draft length (Elhoushi et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from lede_env.arguments import whole_number
from lede_env.decoding.strategies.base import Control, Strategy
from lede_env.engine.round import check_speculation


class _Fixed(Control):
    def __init__(self, exit_layer: int, speculation: int):
        self.layers, self.speculation = (exit_layer,), speculation

    def path(self, round_):
        return self.layers

    def keep_drafting(self, signals, round_):
        return len(round_.drafts) < self.speculation


@dataclass(frozen=True)
class LayerSkip(Strategy):
    """Draft `speculation` tokens at `exit_layer`, then verify."""

    exit_layer: int
    speculation: int
    name = "layerskip"

    def __post_init__(self) -> None:
        whole_number("exit_layer", self.exit_layer)
        check_speculation(self.speculation)

    def start(self, lm, seed) -> Control:
        lm.check_exit_layer(self.exit_layer)
        return _Fixed(self.exit_layer, self.speculation)
