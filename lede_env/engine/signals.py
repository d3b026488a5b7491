"""Exit signals: what an agent sees of a candidate layer's next-token distribution (paper section 3.1.1).

Signals are always those of the distribution at temperature 1. Raw signals (the ten largest log-probabilities, the
entropy, and how far the lookup's guess is below the best token) are what traces keep; features are linear in them.
The paper's k and w are lost in our copy: k = 5 and w = 8 are this project's choices, kept by v0 of every id.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lede_env.engine.lookup import NO_GUESS
from lede_env.errors import LedeError

TOP = 10  # log-probabilities kept
RAW = TOP + 2  # raw signals a layer: TOP log-probabilities, the entropy, the guess's distance
TOGETHER = 64  # rows at a time on a CPU: fresh memory for more than their logits costs as much as the arithmetic
CONFIDENCE_K = 5
TRACE_WINDOW = 8
LOG_FLOOR = -30.0  # keeps every bound finite

PAPER_FEATURES = ("confidence", "entropy", "trace")
EXIT_FEATURES = (*PAPER_FEATURES, "layer", "margin", "top1", "match", "echo")
DRAFT_FEATURES = (*EXIT_FEATURES, "phase", "position", "doubt", "temperature", "drawn", "peril")
HEAD_FEATURES = ("risk", "odds", "ahead")  # of the draft MDP, for models with an acceptance head
MDP_FEATURES = {"exit": EXIT_FEATURES, "draft": DRAFT_FEATURES}
KNOWN_FEATURES = {"exit": EXIT_FEATURES, "draft": (*DRAFT_FEATURES, *HEAD_FEATURES)}
OUTLOOK = 3  # numbers an acceptance head says of a draft: odds, slope, ahead

# What each feature is: weights of the inputs, which are the raw signals and then the context.
CONTEXT = ("trace", "layer", "match", "phase", "position", "doubt", "temperature", "drawn", "peril")
INPUTS = RAW + len(CONTEXT)
FEATURES: dict[str, dict[int, float]] = {
    "confidence": dict.fromkeys(range(CONFIDENCE_K), -1 / CONFIDENCE_K),
    "entropy": {TOP: 1.0},
    "margin": {0: 1.0, 1: -1.0},
    "top1": {0: -1.0},
    "echo": {TOP + 1: -1.0},
    **{name: {place: 1.0} for place, name in enumerate(CONTEXT, RAW)},
    **{name: {} for name in HEAD_FEATURES},  # 0 until an acceptance head has spoken
}
LOOKUP_FEATURES = {"match", "echo"}


def select_features(features: str | Sequence[str], mdp: str) -> tuple[str, ...]:
    """Feature names of "paper", "extended" or a sequence of names, checked against what the MDP has.

    "extended" leaves out `HEAD_FEATURES`, which a model without an acceptance head cannot give; name them.
    """
    known = KNOWN_FEATURES[mdp]
    if isinstance(features, str):
        sets = {"paper": PAPER_FEATURES, "extended": MDP_FEATURES[mdp]}
        if features not in sets:
            raise LedeError(f"features={features!r} is unknown; use 'paper', 'extended' or a tuple of {known}")
        return sets[features]
    names = tuple(features)
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) != len(names):
        raise LedeError(f"features={names!r}: expected distinct names out of {known} ({mdp} MDP)")
    return names


def asks_head(names: Iterable[str]) -> bool:
    """Whether any of these features is what an acceptance head says."""
    return not set(HEAD_FEATURES).isdisjoint(names)


def feature_bounds(names: Iterable[str], vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value of each feature, float32."""
    floor = -LOG_FLOOR
    high = {"entropy": math.log(vocab), "layer": 1.0, "match": 1.0, "phase": 2.0, "position": 1.0, "temperature": 1.0}
    low = {"phase": 1.0, "peril": LOG_FLOOR, "odds": LOG_FLOOR, "ahead": LOG_FLOOR}
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


def guess_distance(logits: Tensor, guesses: Tensor) -> Tensor:
    """(N, V) logits, (N,) tokens -> (N,) how far each token is below the best one, at most
    -LOG_FLOOR, as a number <= 0; LOG_FLOOR where the token is -1, no guess."""
    own = logits.gather(-1, guesses.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return (own - logits.amax(-1)).clamp_min_(LOG_FLOOR).masked_fill_(guesses < 0, LOG_FLOOR)


def raw_signals(logits: Tensor, guesses: Tensor | None = None) -> Tensor:
    """(N, V) logits and (N,) guesses of the lookup, -1 for none -> (N, RAW) raw signals."""
    if guesses is None:
        guesses = torch.full(logits.shape[:1], -1, device=logits.device)
    if logits.device.type == "cpu" and len(logits) > TOGETHER:
        parts = zip(logits.split(TOGETHER), guesses.split(TOGETHER), strict=True)
        return torch.cat([raw_signals(*part) for part in parts])
    log_p = log_probabilities(logits)
    last = torch.stack([entropy(log_p), guess_distance(logits, guesses)], dim=-1)
    return torch.cat([top_log_probabilities(log_p), last], dim=-1)


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
    match: np.ndarray | float = 0.0,
    phase: np.ndarray | float = 1.0,
    position: np.ndarray | float = 0.0,
    doubt: np.ndarray | float = 0.0,
    temperature: float = 0.0,
    drawn: np.ndarray | float = 0.0,
    peril: np.ndarray | float = LOG_FLOOR,
) -> np.ndarray:
    """(..., RAW) raw signals and their context, all broadcastable -> (..., len(names)) float32 features.

    `HEAD_FEATURES` are 0: what a head says is no function of these.
    """
    inputs = np.empty((*raw.shape[:-1], INPUTS), raw.dtype)
    inputs[..., :RAW] = raw
    context = (trace, layer, match, phase, position, doubt, warmth(temperature), drawn, peril)
    for place, value in enumerate(context, RAW):
        inputs[..., place] = value
    # Not by BLAS: there the last bit depends on the number of threads, and datasets are compared bit for bit.
    return np.einsum("...i,if->...f", inputs, feature_matrix(names)).astype(np.float32)


def draft_doubt(margin: float, shortfall: float) -> float:
    """How doubtful a draft is, nats: -log p of it, were there only the two best tokens. Takes no softmax.

    margin: how far the second token is below the best; shortfall: how far the drawn one is.
    """
    return math.log1p(math.exp(-margin)) + shortfall


def draft_peril(doubt: float, coin: float) -> float:
    """How likely a draft is to be rejected, as a number within +-30: its `draft_doubt`, and the log of its coin.

    It is accepted where coin < p / q, p what full depth thinks of it: the less sure the draft, the further p may lie
    below q, and the higher the coin, the less of that it takes.
    """
    return min(max(doubt + math.log(max(coin, 2.0**-53)), LOG_FLOOR), -LOG_FLOOR)


def draft_odds(odds: float, slope: float, coin: float) -> float:
    """Log-odds, within +-30, that a draft is accepted, by the acceptance head's answer and the draft's coin."""
    return min(max(odds - slope * math.log(max(coin, 2.0**-53)), LOG_FLOOR), -LOG_FLOOR)


def draft_ahead(ahead: float) -> float:
    """The acceptance head's log-odds of the next draft, within +-30."""
    return min(max(ahead, LOG_FLOOR), -LOG_FLOOR)


def draft_risk(log_odds: float) -> float:
    """-log of the probability with these log-odds, in [0, 30]."""
    return min(math.log1p(math.exp(-log_odds)), -LOG_FLOOR)


def shortfalls(logits: Tensor, tokens: Tensor) -> Tensor:
    """(..., V) logits, (...,) tokens drawn -> (...,) how far each is below the most probable one, nats, at most 30."""
    own = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return (logits.amax(-1) - own).clamp_max_(-LOG_FLOOR)


def margins(logits: Tensor) -> Tensor:
    """(..., V) logits -> (...,) how far the second most probable token is below the best, nats, at most 30."""
    if logits.shape[-1] < 2:
        return torch.full_like(logits[..., 0], -LOG_FLOOR)
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    return (first - second).clamp_max_(-LOG_FLOOR)


def warmth(temperature: float) -> float:
    """The feature `temperature`: T / (1 + T), in [0, 1), so that it has bounds."""
    return temperature / (1.0 + temperature)


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


@dataclass(slots=True)
class Signals:
    """What a strategy may ask of one row at one layer. Where its numbers come from is a subclass's business."""

    layer: int
    n_layers: int
    position: int  # drafts made so far this round
    cap: int  # the most there can be
    trace: float = 0.0
    guess: tuple[int, float] = NO_GUESS  # the lookup's token, and how long a match it comes from
    doubt: float = 0.0  # sum of `draft_doubt` over the drafts made so far this round
    peril: float = LOG_FLOOR  # the largest `draft_peril` of those
    risk: float = 0.0  # -log of the probability that those are all accepted, by the acceptance head
    temperature: float = 0.0  # of sampling
    token: int = -1  # drawn from this distribution, once it is
    coin: float = 1.0  # that will decide its acceptance; greedy decoding leaves nothing to chance

    @property
    def phase(self) -> int:
        """1 while walking for the round's first draft, 2 afterwards."""
        return 2 if self.position else 1

    def largest(self, count: int) -> list[float]:
        """The largest logits, descending: `count` of them or more, or as many as there are."""
        raise NotImplementedError

    @property
    def best(self) -> int:
        """The most probable token."""
        raise NotImplementedError

    @property
    def log_p_max(self) -> float:
        """Log-probability of the most probable token."""
        raise NotImplementedError

    @property
    def entropy(self) -> float:
        """Of the distribution, nats."""
        raise NotImplementedError

    @property
    def guess_logit(self) -> float:
        """Logit of the lookup's token, where there is one."""
        raise NotImplementedError

    @property
    def token_logit(self) -> float:
        """Logit of the token drawn. Raises LedeError before it is: what then decided by it would not be lossless."""
        raise NotImplementedError

    def need_token(self) -> None:
        """Raise LedeError unless the token is drawn."""
        if self.token < 0:
            raise LedeError(
                "no token is drawn yet where `leave` is asked: shortfall, probability, outlook and what else speaks of "
                "it are for `drew` and `keep_drafting`"
            )

    @property
    def shortfall(self) -> float:
        """How far the token drawn is below the most probable one, nats."""
        return min(self.largest(1)[0] - self.token_logit, -LOG_FLOOR)

    @property
    def own_doubt(self) -> float:
        """`draft_doubt` of the token drawn."""
        return draft_doubt(self.margin, self.shortfall)

    @property
    def own_peril(self) -> float:
        """`draft_peril` of the token drawn."""
        return draft_peril(self.own_doubt, self.coin)

    @property
    def outlook(self) -> tuple[float, float, float]:
        """What the acceptance head says of the token drawn: odds, slope and ahead."""
        raise NotImplementedError

    @property
    def own_odds(self) -> float:
        """`draft_odds` of the token drawn."""
        odds, slope, _ = self.outlook
        return draft_odds(odds, slope, self.coin)

    @property
    def probability(self) -> float:
        """Probability of the token drawn, at temperature 1."""
        return math.exp(self.log_p_max - self.shortfall)

    @property
    def top1(self) -> float:
        """Probability of the most probable token, at temperature 1."""
        return math.exp(self.log_p_max)

    @property
    def margin(self) -> float:
        """How far the second most probable token is below the best, nats."""
        first, second = [*self.largest(2), -math.inf][:2]
        return min(first - second, -LOG_FLOOR)

    def feature(self, name: str) -> float:
        """One feature. What it does not need is not computed."""
        return _OF_SIGNALS[name](self)

    def features(self, names: Sequence[str]) -> np.ndarray:
        """(len(names),) float32."""
        return np.array([self.feature(name) for name in names], np.float32)


def _confidence(signals: Signals) -> float:
    first, *others = signals.largest(CONFIDENCE_K)[:CONFIDENCE_K]
    top = [signals.log_p_max, *(signals.log_p_max + (logit - first) for logit in others)]
    missing = CONFIDENCE_K - len(top)  # of a smaller vocabulary
    return -(sum(max(value, LOG_FLOOR) for value in top) + missing * LOG_FLOOR) / CONFIDENCE_K


def _echo(signals: Signals) -> float:
    if signals.guess[0] < 0:
        return -LOG_FLOOR
    return min(signals.largest(1)[0] - signals.guess_logit, -LOG_FLOOR)


def _drawn(signals: Signals) -> bool:
    """Whether the decision follows a draw: phase 1 decides before it, and so does a walk in phase 2."""
    return signals.position > 0 and signals.token >= 0


def _peril(signals: Signals) -> float:
    return max(signals.peril, signals.own_peril) if _drawn(signals) else signals.peril


def _risk(signals: Signals) -> float:
    return min(signals.risk + draft_risk(signals.own_odds), -LOG_FLOOR) if _drawn(signals) else 0.0


def _ahead(signals: Signals) -> float:
    return draft_ahead(signals.outlook[2]) if _drawn(signals) else 0.0


_OF_SIGNALS: dict[str, Callable[[Signals], float]] = {
    "confidence": _confidence,
    "entropy": lambda signals: signals.entropy,
    "trace": lambda signals: signals.trace,
    "layer": lambda signals: signals.layer / signals.n_layers,
    "margin": lambda signals: signals.margin,
    "top1": lambda signals: -signals.log_p_max,
    "match": lambda signals: signals.guess[1],
    "echo": _echo,
    "phase": lambda signals: float(signals.phase),
    "position": lambda signals: signals.position / signals.cap,
    "doubt": lambda signals: min(signals.doubt, -LOG_FLOOR),
    "temperature": lambda signals: warmth(signals.temperature),
    "drawn": lambda signals: signals.shortfall if _drawn(signals) else 0.0,
    "peril": _peril,
    "risk": _risk,
    "odds": lambda signals: signals.own_odds if _drawn(signals) else 0.0,
    "ahead": _ahead,
}
