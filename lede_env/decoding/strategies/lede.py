"""LEDE's dual control: a learned policy picks the exit layer and, draft by draft, the length (paper section 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from lede_env.arguments import whole_number
from lede_env.decoding.strategies.base import Control, Strategy
from lede_env.engine.acceptance import Draws, derive_seed
from lede_env.engine.round import check_speculation
from lede_env.engine.signals import HEAD_FEATURES, KNOWN_FEATURES, asks_head
from lede_env.errors import LedeError
from lede_env.policies import DEFAULT, ExitPolicy, TrainedPolicy, check_bonus, check_compatible, load_policy


@cache
def _default() -> TrainedPolicy:
    """The policy that ships, read once: a generation asks for its features several times."""
    return load_policy(DEFAULT)


class _DualControl(Control):
    """Phase 1 walks the candidates with the round's first draft and fixes e; phase 2 drafts on at e.

    | phase | continue | exit |
    |---|---|---|
    | 1, walk | next candidate; at the last: keep the draft, verify | fix e here, keep the draft, draft on |
    | 2, draft | verify all drafts | draft on |
    """

    def __init__(self, policy: ExitPolicy, layers: tuple[int, ...], speculation: int | None, coins: Draws):
        self.policy, self.layers, self.speculation, self.coins = policy, layers, speculation, coins
        self.left_by_choice = False
        self.bonus_from = 0.0 if speculation is not None else getattr(policy, "bonus_from", 0.0)

    def _exit(self, signals, round_) -> bool:
        round_.decisions += 1
        if isinstance(self.policy, TrainedPolicy):
            return self.policy.exits(signals)
        observation = signals.features(self.policy.features)[None]  # (1, F)
        answer = np.asarray(self.policy.exit_probability(observation))
        if answer.shape != (1,) or not 0.0 <= answer[0] <= 1.0:
            raise LedeError(
                f"{type(self.policy).__name__}.exit_probability must return 1 number in [0, 1], one an observation; "
                f"got {answer!r}"
            )
        probability = float(answer[0])
        # A coin of its own, known before the token is drawn: a random policy stays lossless.
        return probability >= 1.0 or (probability > 0.0 and self.coins.next() < probability)

    def path(self, round_):
        return (round_.exits[0],) if round_.exits else self.layers

    def leave(self, signals, round_):
        self.left_by_choice = self._exit(signals, round_)
        return self.left_by_choice

    def keep_drafting(self, signals, round_):
        if self.speculation is not None:
            return len(round_.drafts) < self.speculation
        by_choice, self.left_by_choice = self.left_by_choice, False  # of the round's first draft
        return by_choice or self._exit(signals, round_)

    def wants_bonus(self, signals, round_):
        return self.bonus_from == 0.0 or math.exp(-signals.feature("risk")) >= self.bonus_from


@dataclass(frozen=True, eq=False)
class Lede(Strategy):
    """The policy given, or the one that ships with the model; a geometry twin takes those of its donor.

    The ablations of the paper's Table 3 fix one of the two controls: `exit_layer` ("w/o dynamic exit") or
    `speculation`, the draft length ("w/o adaptive drafting").
    """

    policy: ExitPolicy | None = None
    exit_layer: int | None = None
    speculation: int | None = None
    name = "lede"

    def __post_init__(self) -> None:
        if self.policy is not None and not hasattr(self.policy, "exit_probability"):
            raise LedeError(
                f"Lede takes a policy, got {self.policy!r}; load one with lede_env.load_policy(PATH), or leave it out "
                "for the one that ships with the model"
            )
        if self.exit_layer is not None:
            whole_number("exit_layer", self.exit_layer)
        if self.speculation is not None:
            check_speculation(self.speculation)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        if self.exit_layer is not None and self.speculation is not None:
            return ()  # nothing is left to decide
        features = tuple((self.policy or _default()).features)
        # With the length fixed there are no decisions but of phase 1, where an acceptance head has nothing to say yet.
        return tuple(name for name in features if self.speculation is None or name not in HEAD_FEATURES)

    def start(self, lm, seed) -> Control:
        policy = self.policy
        if policy is None:
            if lm.weights not in ("embedded", "twin"):
                raise LedeError(f"no policy ships with model {lm.name!r}; train one and pass Lede(load_policy(PATH))")
            policy = _default()
        if isinstance(policy, TrainedPolicy) and policy.n_layers == lm.donor_layers:
            policy = policy.relabelled(lm.n_layers)
        made_for = getattr(policy, "n_layers", lm.n_layers)  # of those that read the layer number off a share of L
        if made_for != lm.n_layers:
            raise LedeError(f"the policy was made for {made_for} layers, but {lm.name} has {lm.n_layers}")
        # A trained policy brings the candidates it was trained with.
        candidates = policy.candidate_layers if isinstance(policy, TrainedPolicy) else lm.candidate_layers
        check_compatible(policy, lm.fingerprint, candidates, KNOWN_FEATURES["draft"], "draft")
        check_bonus(getattr(policy, "bonus_from", 0.0), policy.features)
        layers = candidates if self.exit_layer is None else (self.exit_layer,)
        head = lm.acceptance_head if asks_head(self.reads) else None
        if head is not None and isinstance(policy, TrainedPolicy) and policy.head not in (None, head.digest):
            raise LedeError(
                f"the policy learned from the answers of another acceptance head ({policy.head}) than {lm.name!r} has "
                f"({head.digest}); train it anew on a trace that this one has been asked about"
            )
        for layer in layers:
            lm.check_exit_layer(layer)
            if head is not None:
                head.candidate(layer)  # raises where it knows nothing of that layer
        return _DualControl(policy, layers, self.speculation, Draws(derive_seed(seed, 0, 1)))
