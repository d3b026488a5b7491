"""DEL: exit layer and draft length from how often every layer agreed so far (Entezari Zarch et al. 2025).

Choices where the paper leaves room, or our reading of it:

- A position is what the verification of one token saw; a round has those up to and including its first miss. All
  candidates are compared with the full-depth argmax on the same positions, at any temperature.
- Decayed means: sums are multiplied by 0.95 once a round, then the round's positions are added. The last 32 prompt
  positions are one such update, before round 1.
- Confidence is the top-1 probability at temperature 1; its means are kept for every layer apart, and the draft is
  judged by those of the layer it leaves.
- g runs from 1, since a round always drafts a token; ties go to the shallower layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lede_env.decoding.strategies.base import Control, Strategy

DECAY = 0.95
CAP = 18
LONGEST = 17  # draft length up to which a layer's worth is computed; it does not cap the draft


class Tally:
    """Decayed counts of verified positions and sums of confidences, a column for each layer 1..L-1."""

    def __init__(self, layers: int):
        self.counts = np.zeros((2, layers))  # row 0: positions where the layer's argmax missed, row 1: matched
        self.confidences = np.zeros((2, layers))

    def add(self, matched: np.ndarray, confidence: np.ndarray) -> None:
        """Decay what there is, then add n positions: (layers, n) bool and top-1 probabilities."""
        kinds = np.stack([~matched, matched])  # (2, layers, n)
        self.counts = DECAY * self.counts + kinds.sum(-1)
        self.confidences = DECAY * self.confidences + (kinds * confidence).sum(-1)

    def match_rates(self) -> np.ndarray:
        """(layers,) share of matched positions."""
        return self.counts[1] / self.counts.sum(0)

    def midpoint(self, layer: int) -> float:
        """Half-way between the mean confidence of missed and of matched positions; NaN while either has none."""
        counts = self.counts[:, layer - 1]
        return float((self.confidences[:, layer - 1] / counts).mean()) if counts.all() else float("nan")


def best_layer(match_rates: np.ndarray) -> int:
    """The layer with most tokens per layer run: max over l and g of (1 + a_l + .. + a_l^g) / (L + g l)."""
    layers = np.arange(1, len(match_rates) + 1)[:, None]  # (L - 1, 1)
    lengths = np.arange(1, LONGEST + 1)
    tokens = 1 + (match_rates[:, None] ** lengths).cumsum(1)  # (L - 1, g)
    return int((tokens / (len(layers) + 1 + lengths * layers)).max(1).argmax()) + 1


class _Dynamic(Control):
    cap = CAP

    def __init__(self, n_layers: int):
        self.taps = tuple(range(1, n_layers + 1))
        self.tally = Tally(n_layers - 1)
        self.layer, self.first_round = 1, True  # round 1 drafts one token at layer 1
        self.warm = False  # whether the prompt is tallied
        self.studied = np.zeros((n_layers - 1, 0), bool), np.zeros((n_layers - 1, 0))  # the last round's positions

    def path(self, round_):
        return (self.layer,)

    def keep_drafting(self, signals, round_):
        if self.first_round:
            return False
        round_.decisions += 1
        return not signals.top1 < self.tally.midpoint(self.layer)  # NaN stops nothing

    def study(self, states, lm):
        logits = lm.logits(states.flatten(0, 1)).unflatten(0, states.shape[:2])  # (L, n, V)
        tokens = logits.argmax(-1)
        matched = (tokens[:-1] == tokens[-1]).cpu().numpy()
        confidence = (logits.amax(-1) - logits.logsumexp(-1)).exp()[:-1].double().cpu().numpy()
        if self.warm:
            self.studied = matched, confidence  # tallied in `learn`, unless the budget cut the round
        else:
            self.tally.add(matched, confidence)
            self.warm = True
        return tokens.numel()

    def learn(self, round_):
        self.tally.add(*self.studied)
        self.layer, self.first_round = best_layer(self.tally.match_rates()), False


@dataclass(frozen=True)
class Del(Strategy):
    """Each round drafts at the layer with the best expected tokens per layer run, until confidence falls too low.

    Candidates are all layers but the last. Drafting stops after a token whose confidence is below the midpoint of the
    decayed mean confidences on matched and on missed positions, at the latest at 18. Round 1 drafts one token at
    layer 1. Costs the LM head on every layer's state of every verified position (`Round.studied`).
    """

    name = "del"

    def start(self, lm, seed) -> Control:
        lm.check_exit_layer(1)
        return _Dynamic(lm.n_layers)
