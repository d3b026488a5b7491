"""LEDE's dual control: a learned policy picks the exit layer and, draft by draft, the length (paper section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from lede_env.decoding.strategies.base import Control, Strategy
from lede_env.engine.signals import DRAFT_FEATURES
from lede_env.errors import LedeError
from lede_env.policies import ExitPolicy, check_compatible, load_policy


class _DualControl(Control):
    """Phase 1 walks the candidates with the round's first draft and fixes e; phase 2 drafts on at e.

    | phase | continue | exit |
    |---|---|---|
    | 1, walk | next candidate; at the last: keep the draft, verify | fix e here, keep the draft, draft on |
    | 2, draft | verify all drafts | draft on |
    """

    def __init__(self, policy: ExitPolicy, candidates: tuple[int, ...]):
        self.policy, self.candidates = policy, candidates
        self.left_by_choice = False

    def _exit(self, signals, round_) -> bool:
        round_.decisions += 1
        observation = signals.features(self.policy.features)[None]  # (1, F)
        return float(self.policy.exit_probability(observation)[0]) >= 0.5

    def path(self, round_):
        self.left_by_choice = False
        return self.candidates if not round_.drafts else (round_.exits[0],)

    def leave(self, signals, round_):
        self.left_by_choice = self._exit(signals, round_)
        return self.left_by_choice

    def keep_drafting(self, signals, round_):
        return self.left_by_choice or self._exit(signals, round_)


@dataclass(frozen=True, eq=False)
class Lede(Strategy):
    """The policy given, or the one that ships with the model."""

    policy: ExitPolicy | None = None
    name = "lede"

    @property
    def needs_trace(self) -> bool:  # type: ignore[override]
        return self.policy is None or "trace" in self.policy.features

    def start(self, lm) -> Control:
        policy = self.policy
        if policy is None:
            if lm.weights != "embedded":
                raise LedeError(f"no policy ships with model {lm.name!r}; train one and pass Lede(load_policy(PATH))")
            policy = load_policy("tiny")
        made_for = getattr(policy, "n_layers", lm.n_layers)  # of those that read the layer number off a share of L
        if made_for != lm.n_layers:
            raise LedeError(f"the policy was made for {made_for} layers, but {lm.name} has {lm.n_layers}")
        check_compatible(policy, lm.fingerprint, lm.candidate_layers, DRAFT_FEATURES, "draft")
        return _DualControl(policy, lm.candidate_layers)
