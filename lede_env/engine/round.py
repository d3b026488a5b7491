"""One round of self-speculative decoding as pure rules: how many drafts, what is emitted, what is counted.

The decoder and the environments share this file, so that they cannot disagree (design sections 3 and 4).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from lede_env.arguments import whole_number
from lede_env.errors import LedeError

DRAFT_CAP = 12  # paper section 4.1


def check_speculation(speculation: int) -> None:
    """Raise a LedeError unless a round may draft this many tokens."""
    if not 1 <= whole_number("speculation", speculation) <= DRAFT_CAP:
        raise LedeError(f"speculation={speculation} is out of range: a round drafts 1 to {DRAFT_CAP} tokens")


def draft_limit(cap: int, tokens_left: int) -> int:
    """Most drafts a round may make: with one token left it is a plain step."""
    return max(0, min(cap, tokens_left - 1))


@dataclass
class Round:
    """What happened in one round. `exits[i]` is the layer that drew draft i."""

    drafts: list[int] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    checks: int = 0  # heads evaluated at layers the draft then did not leave
    decisions: int = 0  # times the strategy looked at signals
    studied: int = 0  # states put through the head after verification, to learn from
    limited: bool = False  # the token budget, not the strategy, ended drafting
    bonus: bool = True  # the last draft goes through the layers too, for a bonus token should all be accepted
    accepted: int = 0
    emitted: list[int] = field(default_factory=list)

    def settle(self, accepted: int, next_token: int | None, eos_ids: Collection[int]) -> bool:
        """Record verification: accepted drafts, then the corrected or bonus token, if there is one, cut after an EOS.
        True at EOS."""
        self.accepted, self.emitted = accepted, self.drafts[:accepted]
        self.emitted += [next_token] if next_token is not None else []
        for index, token in enumerate(self.emitted):
            if token in eos_ids:
                self.cut(index + 1)
                return True
        return False

    def cut(self, emitted: int) -> None:
        """End the text after `emitted` tokens of this round (EOS, a stop string): nothing after it counts."""
        self.bonus |= emitted < len(self.drafts)  # the last draft that is left went through the layers
        del self.emitted[emitted:], self.drafts[emitted:], self.exits[emitted:]
        self.accepted = min(self.accepted, emitted)

    def layer_calls(self, n_layers: int) -> int:
        """Layers run, heads excluded: every layer once for verification, and e for each draft, the last one's only if
        it may be followed by a bonus token."""
        return n_layers + sum(self.exits if self.bonus else self.exits[:-1])


@dataclass
class Counts:
    """Sums over rounds, and the metrics that are their ratios."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    exit_layers: int = 0
    checks: int = 0
    decisions: int = 0
    layer_calls: int = 0

    def add(self, round_: Round, n_layers: int) -> None:
        self.rounds += 1
        self.drafted += len(round_.drafts)
        self.accepted += round_.accepted
        self.emitted += len(round_.emitted)
        self.exit_layers += sum(round_.exits)
        self.checks += round_.checks
        self.decisions += round_.decisions
        self.layer_calls += round_.layer_calls(n_layers)

    def merge(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def E(self) -> float:
        """Mean exit layer over drafted tokens."""
        return self.exit_layers / self.drafted if self.drafted else float("nan")

    @property
    def d(self) -> float:
        """Mean drafted tokens a round."""
        return self.drafted / self.rounds if self.rounds else float("nan")

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def tokens_per_round(self) -> float:
        return self.emitted / self.rounds if self.rounds else float("nan")
