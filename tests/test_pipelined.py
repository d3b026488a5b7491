"""Rounds that are launched ahead of what decides them are the rounds of the eager decoder."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lede_env
from lede_env import Lede, load_policy
from lede_env.decoding.strategies import STRATEGIES, Control, Strategy
from lede_env.engine.layered_lm import LayeredLM
from lede_env.tasks import load_prompts
from tests.stepwise import Stepwise
from tests.test_losslessness import ON_EMBEDDED, row_of


def on_stepwise_sessions(monkeypatch) -> list[Stepwise]:
    """From here on every session is a `Stepwise`; returns the list that they go to."""
    sessions: list[Stepwise] = []

    def session(lm, batch, capacity, width=13, taps=()):
        sessions.append(Stepwise(lm, batch, capacity, width, taps))
        return sessions[-1]

    monkeypatch.setattr(LayeredLM, "session", session)
    return sessions


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", STRATEGIES)
def test_pipelined_rounds_are_the_eager_ones(tiny, monkeypatch, name, temperature):
    prompts = [prompt.text for prompt in load_prompts("all", "test")[::25]]
    options = dict(max_new_tokens=40, temperature=temperature, seed=3)

    def play() -> list:
        strategies = row_of(ON_EMBEDDED, name)(tiny)
        if name == "lede":  # the shipped policy, but here every round has its bonus token
            strategies[0] = Lede(replace(load_policy("tiny-head"), bonus_from=0.0))
        return [lede_env.generate(tiny, prompt, strategy=s, **options).rounds for s in strategies for prompt in prompts]

    expected = play()
    sessions = on_stepwise_sessions(monkeypatch)
    assert play() == expected
    if name != "autoregressive":  # which looks ahead its own way; Del's rounds cannot be opened ahead
        assert any(session.opened_ahead for session in sessions) == (name != "del")
    if name in ("lite", "lede"):  # walks that were guessed wrongly
        assert any(session.withdrawn for session in sessions)


class Whim(Control):
    """Paths, exits and draft lengths by chance, the same whenever the same is asked."""

    def __init__(self, seed: int, cap: int):
        self.seed, self.cap, self.rounds = seed, cap, 0

    def chance(self, *asked) -> Random:
        return Random(str((self.seed, self.rounds, asked)))

    def path(self, round_):
        chance = self.chance("path", round_.exits)
        return tuple(sorted(chance.sample(range(1, 6), chance.choice([1, 1, 2, 3, 5]))))

    def leave(self, signals, round_):
        return self.chance("leave", round_.exits, round_.checks).random() < 0.5

    def keep_drafting(self, signals, round_):
        return self.chance("keep", round_.drafts).random() < 0.75

    def learn(self, round_):
        self.rounds += 1


class Whims(Strategy):
    name = "whims"

    def __init__(self, seed: int, cap: int, reads: tuple[str, ...]):
        self.seed, self.cap, self.reads = seed, cap, reads

    def start(self, lm, seed):
        return Whim(self.seed, self.cap)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    cap=st.sampled_from([1, 4, 12]),
    reads=st.sampled_from([(), ("trace", "doubt", "peril")]),
    budget=st.sampled_from([*range(1, 7), 24]),
    temperature=st.sampled_from([0.0, 0.7]),
    ends=st.booleans(),
    stop=st.sampled_from([(), ("\n",), ("self", " = ")]),
)
def test_whatever_the_strategy_does_pipelined_rounds_are_the_eager_ones(
    tiny, seed, cap, reads, budget, temperature, ends, stop
):
    eos = tuple(Random(seed).sample(range(tiny.geometry.vocab), 400)) if ends else tiny.eos_ids
    lm, prompt = replace(tiny, eos_ids=eos), Random(seed).choice(load_prompts("all", "test")).text
    strategy = Whims(seed, cap, reads)
    options = dict(max_new_tokens=budget, temperature=temperature, seed=seed, stop=stop)
    expected = lede_env.generate(lm, prompt, strategy=strategy, **options)
    with pytest.MonkeyPatch.context() as monkeypatch:
        on_stepwise_sessions(monkeypatch)
        ours = lede_env.generate(lm, prompt, strategy=strategy, **options)
    assert (ours.rounds, ours.finish_reason, ours.text) == (expected.rounds, expected.finish_reason, expected.text)
