"""What every exit policy offers, and the rules that need no training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lede_env.errors import LedeError

CONTINUE, EXIT = 0, 1


class ExitPolicy(Protocol):
    """A rule that decides, from named features at a candidate layer, whether to exit."""

    @property
    def features(self) -> tuple[str, ...]:
        """What it observes, by name, in this order."""
        ...

    def exit_probability(self, observations: np.ndarray) -> np.ndarray:
        """(N, len(features)) float32 -> (N,) probability of `EXIT`, in [0, 1]."""
        ...


@dataclass(frozen=True)
class RandomPolicy:
    """Exit with probability `p` at every decision, whatever it sees."""

    p: float = 0.5
    features: tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.p <= 1.0:
            raise LedeError(f"RandomPolicy p={self.p} is not a probability; give a number in [0, 1]")

    def exit_probability(self, observations: np.ndarray) -> np.ndarray:
        return np.full(len(observations), self.p)


@dataclass(frozen=True)
class StaticPolicy:
    """Exit at one fixed layer: the first candidate at or above `layer` (1-based) of `n_layers`."""

    layer: int
    n_layers: int
    features: tuple[str, ...] = field(default=("layer",), init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.layer < self.n_layers:
            raise LedeError(
                f"StaticPolicy layer={self.layer} is out of range; the model has {self.n_layers} layers, "
                f"give 1 to {self.n_layers - 1}"
            )

    def exit_probability(self, observations: np.ndarray) -> np.ndarray:
        return (_layers(observations, self.n_layers) >= self.layer).astype(np.float64)


@dataclass(frozen=True)
class ThresholdPolicy:
    """Exit where the probability of the most likely token exceeds the layer's threshold.

    `thresholds` maps every candidate layer (1-based) to a probability in [0, 1]; 1 never exits.
    """

    thresholds: Mapping[int, float]
    n_layers: int
    features: tuple[str, ...] = field(default=("layer", "top1"), init=False)

    def __post_init__(self) -> None:
        for layer, threshold in self.thresholds.items():
            if not (1 <= layer < self.n_layers and 0.0 <= threshold <= 1.0):
                raise LedeError(
                    f"ThresholdPolicy has threshold {threshold} at layer {layer}; layers go from 1 to "
                    f"{self.n_layers - 1}, thresholds from 0 to 1"
                )

    def exit_probability(self, observations: np.ndarray) -> np.ndarray:
        table = np.full(self.n_layers + 1, np.nan)
        table[list(self.thresholds)] = list(self.thresholds.values())
        layers = _layers(observations, self.n_layers)  # (N,)
        limits = table[layers]
        if np.isnan(limits).any():
            missing = sorted(set(layers[np.isnan(limits)].tolist()))
            raise LedeError(
                f"ThresholdPolicy has no threshold for layers {missing}, only for {sorted(self.thresholds)}; "
                "give one for every candidate layer"
            )
        return (np.exp(-observations[:, 1]) > limits).astype(np.float64)  # top1 is -log p_max


@dataclass(frozen=True)
class StaticRounds:
    """Draft MDP: leave at one fixed layer, the first candidate at or above `layer`, and verify `speculation` drafts.

    `cap` is the environment's. One draft can be verified only at the last candidate, to which it walks for that.
    """

    layer: int
    speculation: int
    n_layers: int
    cap: int
    features: tuple[str, ...] = field(default=("layer", "position"), init=False)

    def __post_init__(self) -> None:
        if not (1 <= self.layer < self.n_layers and 1 <= self.speculation <= self.cap):
            raise LedeError(
                f"StaticRounds layer={self.layer}, speculation={self.speculation} is out of range; give a layer from 1 "
                f"to {self.n_layers - 1} and 1 to {self.cap} drafts"
            )

    def exit_probability(self, observations: np.ndarray) -> np.ndarray:
        drafts = np.rint(observations[:, 1] * self.cap) + 1  # with the one in view
        return ((_layers(observations, self.n_layers) >= self.layer) & (drafts < self.speculation)).astype(np.float64)


@dataclass(frozen=True)
class EpsilonGreedy:
    """Another policy, but at a share `epsilon` of the decisions a fair coin: every action has a known probability."""

    policy: ExitPolicy
    epsilon: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.epsilon <= 1.0:
            raise LedeError(f"EpsilonGreedy epsilon={self.epsilon} is not a probability; give a number in [0, 1]")

    @property
    def features(self) -> tuple[str, ...]:
        return self.policy.features

    @property
    def bonus_from(self) -> float:
        """Of `TrainedPolicy`: what becomes of a round's end is no decision of the MDP."""
        return getattr(self.policy, "bonus_from", 0.0)

    def exit_probability(self, observations: np.ndarray) -> np.ndarray:
        # In double precision, so that how many rows are computed together cannot turn a close decision.
        chosen = self.policy.exit_probability(observations.astype(np.float64))
        return (1.0 - self.epsilon) * chosen + self.epsilon / 2


def _layers(observations: np.ndarray, n_layers: int) -> np.ndarray:
    """The feature `layer` (e / L, column 0) back to layer numbers: (N, F) -> (N,) int."""
    return np.rint(observations[:, 0] * n_layers).astype(np.int64)
