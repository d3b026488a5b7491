"""Exit signals: what an agent sees of a candidate layer's next-token distribution (paper section 3.1.1).

Signals are always those of the distribution at temperature 1. Raw signals (the ten largest log-probabilities and
the entropy) are what files and traces keep; features are computed from them, so a feature can be added later.
The paper's k and w are lost in our copy: k = 5 and w = 8 are this project's choices, kept by v0 of every id.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lede_env.errors import LedeError

TOP = 10  # log-probabilities kept
RAW = TOP + 1  # raw signals a layer: TOP log-probabilities, then the entropy
CONFIDENCE_K = 5
TRACE_WINDOW = 8
LOG_FLOOR = -30.0  # keeps every bound finite

PAPER_FEATURES = ("confidence", "entropy", "trace")
EXIT_FEATURES = (*PAPER_FEATURES, "layer", "margin", "top1")
DRAFT_FEATURES = (*EXIT_FEATURES, "phase", "position")
MDP_FEATURES = {"exit": EXIT_FEATURES, "draft": DRAFT_FEATURES}

# What each feature is: weights of the inputs, which are the raw signals and then the four context values.
INPUTS = RAW + 4
FEATURES: dict[str, dict[int, float]] = {
    "confidence": dict.fromkeys(range(CONFIDENCE_K), -1 / CONFIDENCE_K),
    "entropy": {TOP: 1.0},
    "trace": {RAW: 1.0},
    "layer": {RAW + 1: 1.0},
    "margin": {0: 1.0, 1: -1.0},
    "top1": {0: -1.0},
    "phase": {RAW + 2: 1.0},
    "position": {RAW + 3: 1.0},
}


def select_features(features: str | Sequence[str], mdp: str) -> tuple[str, ...]:
    """Feature names of "paper", "extended" or a sequence of names, checked against what the MDP has."""
    known = MDP_FEATURES[mdp]
    if isinstance(features, str):
        sets = {"paper": PAPER_FEATURES, "extended": known}
        if features not in sets:
            raise LedeError(f"features={features!r} is unknown; use 'paper', 'extended' or a tuple of {known}")
        return sets[features]
    names = tuple(features)
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) != len(names):
        raise LedeError(f"features={names!r}: expected distinct names out of {known} ({mdp} MDP)")
    return names


def feature_bounds(names: Iterable[str], vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value of each feature, float32."""
    floor = -LOG_FLOOR
    high = {"entropy": math.log(vocab), "layer": 1.0, "phase": 2.0, "position": 1.0}
    low = {"phase": 1.0}
    names = tuple(names)
    return (
        np.array([low.get(name, 0.0) for name in names], np.float32),
        np.array([high.get(name, floor) for name in names], np.float32),
    )


def log_probabilities(logits: Tensor) -> Tensor:
    """(..., V) logits -> (..., V) log-probabilities at temperature 1, floored."""
    return logits.log_softmax(-1).clamp_min_(LOG_FLOOR)


def top_log_probabilities(log_p: Tensor) -> Tensor:
    """(..., V) log-probabilities -> the TOP largest, descending; a smaller vocabulary leaves the rest at the floor."""
    top = log_p.topk(min(TOP, log_p.shape[-1]), dim=-1).values
    return top if top.shape[-1] == TOP else F.pad(top, (0, TOP - top.shape[-1]), value=LOG_FLOOR)


def entropy(log_p: Tensor) -> Tensor:
    """(..., V) log-probabilities -> (...,) entropy in nats. The clamp is for rounding, which would pass the bounds."""
    return torch.linalg.vecdot(log_p.exp(), log_p).neg_().clamp_(0.0, math.log(log_p.shape[-1]))


def raw_signals(logits: Tensor) -> Tensor:
    """(N, V) logits -> (N, RAW): the TOP largest log-probabilities, then the entropy."""
    log_p = log_probabilities(logits)
    return torch.cat([top_log_probabilities(log_p), entropy(log_p).unsqueeze(-1)], dim=-1)


def feature_matrix(names: Sequence[str]) -> np.ndarray:
    """(INPUTS, len(names)) float32: every feature is linear in the raw signals and their context, see `FEATURES`."""
    matrix = np.zeros((INPUTS, len(names)), np.float32)
    for column, name in enumerate(names):
        for row, weight in FEATURES[name].items():
            matrix[row, column] = weight
    return matrix


def compute_features(
    names: Sequence[str],
    raw: np.ndarray,
    *,
    layer: np.ndarray | float,
    trace: np.ndarray | float,
    phase: np.ndarray | float = 1.0,
    position: np.ndarray | float = 0.0,
) -> np.ndarray:
    """(..., RAW) raw signals and their context, all broadcastable -> (..., len(names)) float32 features."""
    inputs = np.empty((*raw.shape[:-1], INPUTS), np.float32)
    inputs[..., :RAW] = raw
    for place, value in enumerate((trace, layer, phase, position), RAW):
        inputs[..., place] = value
    return inputs @ feature_matrix(names)


def no_lap(part: str) -> None:
    """Where nobody measures."""


class TraceWindow:
    """The `trace` feature of one sequence: mean of -log p_max over its last w tokens, 0 while there are none."""

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=TRACE_WINDOW)

    def push(self, neg_log_p_max: float) -> None:
        self.values.append(min(neg_log_p_max, -LOG_FLOOR))

    def mean(self, extra: Sequence[float] = ()) -> float:
        """The mean once the `extra` values, this round's drafts, are appended."""
        window = [*self.values, *extra][-TRACE_WINDOW:]
        return sum(window) / len(window) if window else 0.0


def trace_feature(neg_log_p_max: np.ndarray) -> np.ndarray:
    """(T,) values of one text -> (T,) `trace` seen when token t is next: the mean over the w tokens before it."""
    total = np.concatenate([[0.0], np.cumsum(np.minimum(neg_log_p_max, -LOG_FLOOR), dtype=np.float64)])
    here = np.arange(len(neg_log_p_max))
    begin = np.maximum(here - TRACE_WINDOW, 0)
    return ((total[here] - total[begin]) / np.maximum(here - begin, 1)).astype(np.float32)


class Signals:
    """What a strategy may ask of one row at one layer. Computed on demand: not asking costs nothing."""

    __slots__ = ("_log_p", "_tokens", "_top", "cap", "lap", "layer", "logits", "n_layers", "phase", "position", "trace")

    def __init__(
        self,
        logits: Tensor,
        layer: int,
        n_layers: int,
        phase: int,
        position: int,
        cap: int,
        trace: float,
        lap: Callable[[str], None] = no_lap,
    ):
        self.logits = logits  # (V,)
        self.layer, self.n_layers = layer, n_layers
        self.phase = phase  # 1 walking for the round's first draft, 2 afterwards
        self.position, self.cap = position, cap  # drafts made so far this round, and the most there can be
        self.trace = trace
        self.lap = lap  # the profile's stopwatch
        self._top: list[float] | None = None

    @property
    def top(self) -> list[float]:
        """The TOP largest log-probabilities, descending."""
        if self._top is None:
            self.lap("policy")
            self._log_p = log_probabilities(self.logits)
            top, tokens = self._log_p.topk(min(TOP, len(self._log_p)))
            self._top, self._tokens = top.tolist(), tokens
            self._top += [LOG_FLOOR] * (TOP - len(self._top))
            self.lap("signals")
        return self._top

    @property
    def best(self) -> int:
        """The most probable token."""
        return int(self._tokens[0] if self._top is not None else self.logits.argmax())

    @property
    def top1(self) -> float:
        """Probability of the most probable token, at temperature 1."""
        return math.exp(self.top[0])

    def inputs(self, names: Sequence[str]) -> np.ndarray:
        """(INPUTS,) float32: what `feature_matrix(names)` takes. The entropy is 0 unless `names` asks for it."""
        top, spread = self.top, 0.0
        if "entropy" in names:
            spread = entropy(self._log_p).item()
            self.lap("signals")
        context = (self.trace, self.layer / self.n_layers, self.phase, self.position / self.cap)
        return np.array((*top, spread, *context), np.float32)

    def features(self, names: Sequence[str]) -> np.ndarray:
        """(len(names),) float32."""
        return self.inputs(names) @ feature_matrix(names)
