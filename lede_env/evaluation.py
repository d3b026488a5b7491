"""Scoring settings and policies without decoding again: what a text's acceptance table already decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import gymnasium as gym
import numpy as np

from lede_env.engine.cost_model import CostModel
from lede_env.engine.round import DRAFT_CAP, draft_limit
from lede_env.errors import LedeError
from lede_env.policies import ExitPolicy, RandomPolicy, check_compatible
from lede_env.registration import extended_for

if TYPE_CHECKING:
    from lede_env.oracles import DraftTable, ExitTable


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


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a policy does on an environment's prompts, exactly: nothing is played, no coin is tossed.

    `J` is the mean return over the prompts, of each the mean over its recorded samples; on the exit MDP at a
    temperature it is expected over the drafts' coins too. `normalised_score` is 0 for random play and 100 for the
    clairvoyant optimum, which no policy that only observes reaches.

    The others are ratios of sums. `d`, `tokens_per_round` and `modelled_speedup` are of rounds: None on the exit MDP,
    whose policies can be evaluated on the matching draft MDP. On the exit MDP `acceptance` is the agreement with the
    full depth.
    """

    env_id: str
    prompt_ids: tuple[str, ...]
    per_prompt: dict[str, np.ndarray]  # (P,) each: returns, drafted, accepted, exit_layers; of rounds: and more
    J_random: float
    J_oracle: float

    @property
    def returns(self) -> np.ndarray:
        """(P,), for `paired_bootstrap`."""
        return self.per_prompt["returns"]

    @property
    def J(self) -> float:
        return float(self.returns.mean())

    @property
    def normalised_score(self) -> float:
        return float(_normalise(self.J, self.J_random, self.J_oracle))

    @property
    def E(self) -> float | None:
        """Mean exit layer over drafted tokens."""
        return self._ratio("exit_layers", "drafted")

    @property
    def d(self) -> float | None:
        """Mean drafted tokens a round."""
        return self._ratio("drafted", "rounds")

    @property
    def acceptance(self) -> float | None:
        return self._ratio("accepted", "drafted")

    @property
    def tokens_per_round(self) -> float | None:
        return self._ratio("emitted", "rounds")

    @property
    def modelled_speedup(self) -> float | None:
        """Tokens per autoregressive step's worth of modelled time."""
        return self._ratio("emitted", "cost")

    def _ratio(self, over: str, under: str) -> float | None:
        if not {over, under} <= self.per_prompt.keys():
            return None
        return float(self.per_prompt[over].sum() / self.per_prompt[under].sum())

    def __str__(self) -> str:
        names = ("J", "normalised_score", "E", "d", "acceptance", "tokens_per_round", "modelled_speedup")
        values = ((name, getattr(self, name)) for name in names)
        return ", ".join(f"{name} {value:.3f}" for name, value in values if value is not None)


def evaluate(policy: ExitPolicy, env_id: str, split: str = "test", **kwargs: Any) -> Evaluation:
    """The exact value of a policy on an environment's trace (design section 6).

    Args:
        policy: what it may observe is up to it, whatever features the id pins. Bonus tokens that it gives up, which
            the MDP does not know, are kept; `benchmarks.policy_limits` plays it without them.
        env_id: which MDP, and on which trace: the one the id pins.
        split: of the prompts.
        kwargs: arguments of the environment, to override what the id pins.

    Raises:
        LedeError: an unknown id or argument, a policy for another model, other layers or another MDP, or one whose
            `exit_probability` does not give probabilities.
    """
    env, table = _problem(env_id, split, kwargs, policy.features)
    known = env.attributes
    check_compatible(policy, known["model_fingerprint"], known["candidate_layers"], env.features, known["mdp"])
    return _evaluation(env, env_id, table, table.play(table.decisions(policy)))


def evaluate_oracle(
    env_id: str, split: str = "test", goal: Literal["return", "speedup"] = "return", **kwargs: Any
) -> Evaluation:
    """The clairvoyant optimum of the return, score 100, or (draft MDP) of the modelled speedup. Arguments: `evaluate`.

    Raises:
        LedeError: as `evaluate`; or the exit MDP, which has no speedup.
    """
    from lede_env.oracles import DraftTable

    env, table = _problem(env_id, split, kwargs)
    if goal == "return":
        return _evaluation(env, env_id, table, table.oracle())
    if goal != "speedup" or not isinstance(table, DraftTable):
        raise LedeError(f"goal={goal!r} for {env_id}; use 'return', or on a draft MDP 'speedup'")
    return _evaluation(env, env_id, table, table.fastest())


def normalized_score(env_id: str, returns: Any, split: str = "test", **kwargs: Any) -> Any:
    """100 (J - J_random) / (J_oracle - J_random), elementwise, for returns on an environment. Arguments: `evaluate`.

    `returns` is a number or an array. Both references are means over the prompts of the split, so that only a mean
    over all of them has a score between 0 and 100; the mean of the scores is the score of the mean.
    """
    _, table = _problem(env_id, split, kwargs)
    scores = _normalise(np.asarray(returns, np.float64), *_references(table))
    return float(scores) if np.ndim(returns) == 0 else scores


def _problem(
    env_id: str, split: str, kwargs: dict[str, Any], reads: Sequence[str] = ()
) -> tuple[Any, ExitTable | DraftTable]:
    """The environment with all features, those of an acceptance head where `reads` names them, and its table."""
    from lede_env.oracles import tabulate

    features = extended_for(env_id, reads)
    try:
        env: Any = gym.make(env_id, **{"backend": "trace", "split": split, **kwargs, "features": features}).unwrapped
    except gym.error.Error as error:
        raise LedeError(f"environment {env_id!r} cannot be made: {error}") from error
    return env, tabulate(env)


def _references(table: ExitTable | DraftTable) -> tuple[float, float]:
    """J_random and J_oracle."""
    random, oracle = table.play(table.decisions(RandomPolicy(0.5))), table.oracle()
    return float(random["returns"].mean()), float(oracle["returns"].mean())


def _evaluation(env: Any, env_id: str, table: ExitTable | DraftTable, totals: dict[str, np.ndarray]) -> Evaluation:
    low, high = _references(table)
    return Evaluation(env_id=env_id, prompt_ids=tuple(env.prompt_ids), per_prompt=totals, J_random=low, J_oracle=high)


def _normalise(returns: Any, low: float, high: float) -> Any:
    """NaN where the optimum is no better than random play: there is nothing to score."""
    return 100.0 * (returns - low) / (high - low) if high > low else returns * math.nan


@dataclass(frozen=True)
class Difference:
    """A mean difference and its confidence interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """How much higher `a` is than `b`, on average over the same prompts: a percentile bootstrap over the prompts.

    Args:
        a, b: (P,) a value a prompt, of the same prompts in the same order (`Evaluation.returns`).

    Raises:
        LedeError: not one value of each for every prompt, or a confidence outside (0, 1).
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise LedeError(f"paired values have shapes {a.shape} and {b.shape}; give one value a prompt of each")
    if not 0.0 < confidence < 1.0 or resamples < 1:
        raise LedeError(f"confidence={confidence} must lie in (0, 1), and resamples={resamples} must be at least 1")
    difference, rng = a - b, np.random.default_rng(seed)
    means = [difference[rng.integers(len(a), size=len(a))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, (0.5 - confidence / 2, 0.5 + confidence / 2))
    return Difference(float(difference.mean()), float(low), float(high))
