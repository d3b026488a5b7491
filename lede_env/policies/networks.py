"""Policies that are small networks, run in numpy: they act greedily on the values of `CONTINUE` and `EXIT`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lede_env.errors import LedeError
from lede_env.policies.rules import CONTINUE, EXIT
from lede_env.policies.trained import TrainedPolicy

if TYPE_CHECKING:
    from lede_env.engine.signals import Signals


@dataclass(frozen=True, eq=False)
class MLPPolicy(TrainedPolicy):
    """Greedy on the Q-values of a small ReLU network (paper section 3.2), run in numpy.

    weights: one (outputs, inputs) float32 array a layer, biases: (outputs,); the last layer gives
        Q(continue), Q(exit).
    mean, std: (F,) the observation normaliser; the network sees ``(observation - mean) / std``.
    """

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    mean: np.ndarray
    std: np.ndarray
    kind: ClassVar[str] = "mlp"

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (len(self.features), *(len(bias) for bias in self.biases))
        shapes = [weight.shape for weight in self.weights]
        expected = [(outputs, inputs) for inputs, outputs in itertools.pairwise(sizes)]
        if shapes != expected or sizes[-1] != 2:
            raise LedeError(f"MLPPolicy on {sizes[0]} features has weights {shapes}; expected {expected}, 2 outputs")
        if self.mean.shape != (sizes[0],) or self.std.shape != (sizes[0],) or not (self.std > 0).all():
            raise LedeError(f"MLPPolicy needs a mean and a positive std for each of {self.features}")
        if not all(np.isfinite(array).all() for array in (*self.weights, *self.biases, self.mean, self.std)):
            raise LedeError("MLPPolicy has a weight or a normaliser that is not finite; its training diverged")

    @classmethod
    def random(cls, features: Sequence[str], hidden: Sequence[int] = (64, 64), seed: int = 0) -> MLPPolicy:
        """Untrained, for no model in particular: to time a policy, or to test what takes one."""
        rng = np.random.default_rng(seed)
        sizes = list(itertools.pairwise((len(features), *hidden, 2)))
        return cls(
            weights=tuple(rng.normal(0, m**-0.5, size=(n, m)).astype(np.float32) for m, n in sizes),
            biases=tuple(np.zeros(n, np.float32) for _, n in sizes),
            mean=np.zeros(len(features), np.float32),
            std=np.ones(len(features), np.float32),
            features=tuple(features),
            mdp="exit",
            candidate_layers=(),
            n_layers=0,
            model_fingerprint="",
            model_name="",
        )

    @cached_property
    def _layers(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(inputs, outputs) matrix and (outputs,) bias of each layer; the first one includes the normaliser."""
        first = self.weights[0] / self.std  # W (x - mean) / std + b = (W / std) x + (b - (W / std) mean)
        matrices = (first, *self.weights[1:])
        biases = (self.biases[0] - first @ self.mean, *self.biases[1:])
        return [(np.ascontiguousarray(matrix.T), bias) for matrix, bias in zip(matrices, biases, strict=True)]

    def q_values(self, observations: np.ndarray) -> np.ndarray:
        """(N, F) -> (N, 2) values of `CONTINUE` and `EXIT`."""
        *hidden, (matrix, bias) = self._layers
        x = observations
        for inner, inner_bias in hidden:
            x = np.maximum(x @ inner + inner_bias, 0.0)
        return x @ matrix + bias

    @cached_property
    def _short(self) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray, float]:
        """As `_layers`, to Q(exit) - Q(continue) of one observation: (outputs, inputs) matrices and biases of the
        hidden layers, then the vector and the number of the last."""
        *hidden, (last, bias) = self._layers
        turned = [(np.ascontiguousarray(matrix.T), inner_bias) for matrix, inner_bias in hidden]
        return turned, last[:, EXIT] - last[:, CONTINUE], float(bias[EXIT] - bias[CONTINUE])

    def advantage(self, observation: np.ndarray) -> float:
        """Q(exit) - Q(continue) of one (F,) observation."""
        hidden, last, last_bias = self._short
        x = observation
        for matrix, bias in hidden:
            x = matrix.dot(x)
            x += bias
            np.maximum(x, 0.0, out=x)
        return float(last.dot(x)) + last_bias

    def exits(self, signals: Signals) -> bool:
        return self.advantage(signals.features(self.features)) > 0.0

    def exit_probability(self, observations: np.ndarray) -> np.ndarray:
        q = self.q_values(observations)
        return (q[:, EXIT] > q[:, CONTINUE]).astype(np.float64)

    def tensors(self, name: str = "layers") -> dict[str, np.ndarray]:
        """What policy.safetensors holds: ``<name>.<i>.weight`` (outputs, inputs) and ``<name>.<i>.bias`` (outputs,)."""
        parts = {"weight": self.weights, "bias": self.biases}
        return {
            f"{name}.{i}.{part}": np.ascontiguousarray(array)
            for part, arrays in parts.items()
            for i, array in enumerate(arrays)
        }

    def card(self) -> dict[str, Any]:
        """What policy.json holds."""
        return super().card() | {
            "hidden_sizes": [len(bias) for bias in self.biases[:-1]],
            "activation": "relu",
            "normaliser": {"mean": self.mean.tolist(), "std": self.std.tolist()},
        }


@dataclass(frozen=True, eq=False)
class MaskedMLPPolicy(MLPPolicy):
    """An `MLPPolicy` that acts as those who logged its data might have: batch-constrained Q-learning (Fujimoto, 2019).

    An action is allowed where `imitator` gives it more than `flexibility` times the probability of the likelier one.
    Of the allowed actions the one with the higher Q-value is taken.

    imitator: its two outputs are the logits of the logged actions; the same observations and normaliser.
    flexibility: in (0, 1); towards 0 all is allowed, towards 1 only the likelier action.
    """

    imitator: MLPPolicy = field(kw_only=True)
    flexibility: float = field(kw_only=True)
    kind: ClassVar[str] = "masked_mlp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.flexibility < 1.0:
            raise LedeError(f"MaskedMLPPolicy flexibility={self.flexibility} is not in (0, 1)")
        if self.imitator.features != self.features:
            raise LedeError(f"MaskedMLPPolicy observes {self.features}, but its imitator {self.imitator.features}")

    def exit_probability(self, observations: np.ndarray) -> np.ndarray:
        logits, edge = self.imitator.q_values(observations), math.log(self.flexibility)
        preference = logits[:, EXIT] - logits[:, CONTINUE]
        wanted = super().exit_probability(observations)
        return np.where(preference <= edge, 0.0, np.where(-preference <= edge, 1.0, wanted))

    def advantage(self, observation: np.ndarray) -> float:
        preference, edge = self.imitator.advantage(observation), math.log(self.flexibility)
        if preference <= edge:
            return -math.inf
        return math.inf if -preference <= edge else super().advantage(observation)

    def tensors(self, name: str = "layers") -> dict[str, np.ndarray]:
        return super().tensors(name) | self.imitator.tensors("imitator")

    def card(self) -> dict[str, Any]:
        hidden_sizes = self.imitator.card()["hidden_sizes"]
        return super().card() | {"imitator_hidden_sizes": hidden_sizes, "flexibility": self.flexibility}
