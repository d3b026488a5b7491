"""LITE: every token leaves at the first layer that is confident enough (Varshney et al. 2023)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lede_env.arguments import number, whole_number
from lede_env.decoding.strategies.base import Control, Strategy
from lede_env.errors import LedeError
from lede_env.models.loading import EMBEDDED
from lede_env.models.zoo import twin_layer

if TYPE_CHECKING:
    from lede_env.engine.layered_lm import LayeredLM

STORED = EMBEDDED / "lite.json"


class _PerToken(Control):
    def __init__(self, thresholds: Mapping[int, float]):
        self.thresholds, self.layers = dict(thresholds), tuple(sorted(thresholds))

    def path(self, round_):
        return self.layers

    def leave(self, signals, round_):
        round_.decisions += 1
        return signals.top1 > self.thresholds[signals.layer]

    def keep_drafting(self, signals, round_):
        return True  # only the cap of 12 ends a draft


@dataclass(frozen=True)
class Lite(Strategy):
    """Each draft walks the layers of `thresholds` and leaves at the first whose top-1 probability exceeds the layer's.

    At the last layer it always does. By default the thresholds are those stored with the model; for another model
    `python -m lede_env.decoding.calibrate_lite` computes them. LITE's own are not published: these are the smallest
    with which at least 90 % of the tokens that leave agree with the full depth.
    """

    thresholds: Mapping[int, float] | None = None
    name = "lite"

    def __post_init__(self) -> None:
        if self.thresholds is None:
            return
        if not isinstance(self.thresholds, Mapping) or not self.thresholds:
            raise LedeError(
                f"thresholds={self.thresholds!r} of Lite must be a dict, not empty: a probability for every candidate "
                "layer; leave it out for those stored with the model"
            )
        for layer, threshold in self.thresholds.items():
            whole_number("exit_layer", layer)
            if not 0.0 <= number(f"thresholds[{layer}]", threshold) <= 1.0:
                raise LedeError(f"Lite threshold {threshold} at layer {layer} is not a probability; give one in [0, 1]")

    def start(self, lm, seed) -> Control:
        thresholds = stored_thresholds(lm) if self.thresholds is None else self.thresholds
        for layer in thresholds:
            lm.check_exit_layer(layer)
        return _PerToken(thresholds)


def stored_thresholds(lm: LayeredLM) -> dict[int, float]:
    """The thresholds that were calibrated for this model or a twin's donor, by layer; raises LedeError if none were."""
    if lm.weights in ("embedded", "twin") and STORED.is_file():
        card = json.loads(STORED.read_text())
        if card["model_fingerprint"] == lm.fingerprint:
            donor_layers, stored = lm.donor_layers or lm.n_layers, card["thresholds"].items()
            return {twin_layer(int(layer), donor_layers, lm.n_layers): threshold for layer, threshold in stored}
    raise LedeError(
        f"no Lite thresholds are stored for model {lm.name!r}; run `python -m lede_env.decoding.calibrate_lite "
        f"--model {lm.name}` and pass the thresholds it prints: Lite({{...}})"
    )
