"""Rounds that are launched ahead of what decides them are the rounds of the eager decoder."""

from __future__ import annotations

import pytest

import lede_env
from lede_env.decoding.strategies import STRATEGIES
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
        return [lede_env.generate(tiny, prompt, strategy=s, **options).rounds for s in strategies for prompt in prompts]

    expected = play()
    sessions = on_stepwise_sessions(monkeypatch)
    assert play() == expected
    if name != "autoregressive":  # which looks ahead its own way; Del's rounds cannot be opened ahead
        assert any(session.opened_ahead for session in sessions) == (name != "del")
    if name in ("lite", "lede"):  # walks that were guessed wrongly
        assert any(session.withdrawn for session in sessions)
