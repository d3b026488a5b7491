"""Exit signals: what an agent sees of a candidate layer's next-token distribution (paper section 3.1.1).

Signals are always those of the distribution at temperature 1. Raw signals (the ten largest log-probabilities and
the entropy) are what files and traces keep; features are computed from them, so a feature can be added later.
The paper's k and w are lost in our copy: k = 5 and w = 8 are this project's choices, kept by v0 of every id.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import torch
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


def raw_signals(logits: Tensor) -> Tensor:
    """(N, V) logits -> (N, RAW): the TOP largest log-probabilities, descending and floored, and the entropy in nats."""
    log_p = torch.log_softmax(logits, dim=-1)
    top = log_p.topk(min(TOP, log_p.shape[-1]), dim=-1).values
    if top.shape[-1] < TOP:
        top = torch.nn.functional.pad(top, (0, TOP - top.shape[-1]), value=LOG_FLOOR)
    entropy = -(log_p.exp() * log_p.clamp_min(-1e30)).sum(-1, keepdim=True)
    entropy = entropy.clamp(0.0, math.log(log_p.shape[-1]))  # rounding alone would pass the bounds
    return torch.cat([top.clamp_min(LOG_FLOOR), entropy], dim=-1)


def compute_features(
    names: Sequence[str],
    raw: np.ndarray,
    *,
    layer: np.ndarray | float,
    trace: np.ndarray | float,
    phase: np.ndarray | float = 1.0,
    position: np.ndarray | float = 0.0,
) -> np.ndarray:
    """(..., RAW) raw signals and their context, all broadcastable -> (..., len(names)) float32 features.

    `layer` is e / L, `trace` the window's mean, `position` the drafts made so far over the cap.
    """
    columns = {
        "confidence": lambda: -raw[..., :CONFIDENCE_K].mean(-1),
        "entropy": lambda: raw[..., TOP],
        "trace": lambda: trace,
        "layer": lambda: layer,
        "margin": lambda: raw[..., 0] - raw[..., 1],
        "top1": lambda: -raw[..., 0],
        "phase": lambda: phase,
        "position": lambda: position,
    }
    out = np.empty((*raw.shape[:-1], len(names)), np.float32)
    for column, name in enumerate(names):
        out[..., column] = columns[name]()
    return out


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

    __slots__ = ("_raw", "cap", "layer", "logits", "n_layers", "phase", "position", "trace")

    def __init__(self, logits: Tensor, layer: int, n_layers: int, phase: int, position: int, cap: int, trace: float):
        self.logits = logits  # (V,)
        self.layer, self.n_layers = layer, n_layers
        self.phase = phase  # 1 walking for the round's first draft, 2 afterwards
        self.position, self.cap = position, cap  # drafts made so far this round, and the most there can be
        self.trace = trace
        self._raw: np.ndarray | None = None

    @property
    def raw(self) -> np.ndarray:
        """(RAW,) of the logits' type."""
        if self._raw is None:
            self._raw = raw_signals(self.logits.unsqueeze(0))[0].cpu().numpy()
        return self._raw

    @property
    def top1(self) -> float:
        """Probability of the most probable token, at temperature 1."""
        return math.exp(self.raw[0])

    def features(self, names: Sequence[str]) -> np.ndarray:
        """(len(names),) float32."""
        return compute_features(
            names,
            self.raw,
            layer=self.layer / self.n_layers,
            trace=self.trace,
            phase=float(self.phase),
            position=self.position / self.cap,
        )
